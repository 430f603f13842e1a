"""The sub-commands of `patch-llm`, one module each.

A command module has
    NAME, SUMMARY, EXAMPLES   texts of the help
    Options                   record of its settings; fields made with `setting` become flags
    SECTION_FLAGS             flags for settings inside a section, {flag: (record, section, field)}; optional
    run(options)              does the work; prints results to stdout
    on_interrupt(options)     what is kept after Ctrl-C and how to go on
No module imports torch at the top, so that `patch-llm --help` answers at once.
"""
