"""`patch-llm oneshot`: the whole way, interrupts at every stage, what is refused before any work."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
import transformers
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model
from support.scale import LLAMA_7B

import patch
from patch import cli
from patch.artifacts.artifact import load_artifact
from patch.cli.commands import oneshot as command
from patch.files.folder import verify_folder, write_folder
from patch.jobs import oneshot as job
from patch.models.structure import maskable_linears
from patch.packed.swap import packed_layers
from patch.pruning import block_fit, one_shot, permutation, reconstruction

COMMAND = "oneshot --model {w}/model --data {w}/train.txt --seqlen 32 --nsamples 4 --heldout-windows 2 --tile 64"
REORDERING = f"{COMMAND} --reorder"
DONE = {
    "reordered": ["dense"],
    "prune_hybrid": ["dense", "reorder"],
    "reconstruct": ["dense", "reorder", "prune"],
    "pack_model": ["dense", "reorder", "prune", "reconstruct"],
}
STAGES = ["dense", "prune", "reconstruct", "reorder", "reordered"]


def call(capsys, work, *more, text=REORDERING):
    return run(capsys, *text.format(w=work).split(), *more)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """A short search: most tests go through it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(one_shot, "DEFAULT_STEPS", 3)
        yield


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(work):
    """Folder of a finished job that kept its stages."""
    out = work / "oneshot"
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main([*REORDERING.format(w=work).split(), "--keep-stages", "--out", str(out)]) == 0
    (work / "oneshot.out").write_text(printed.getvalue())
    (work / "oneshot.err").write_text(said.getvalue())
    return out


def test_a_dense_model_becomes_a_packed_one(made, work):
    model = patch.load(made)
    layers = dict(packed_layers(model))
    assert len(layers) == 14
    printed = (work / "oneshot.out").read_text()
    assert re.search(r"  dense +\d+\.\d{4} +1\.000x   took ", printed)
    for label in ("pruned", "reconstructed", "packed"):
        assert re.search(rf"  {label} +\d+\.\d{{4}} +\d\.\d{{3}}x   took ", printed)
    assert re.search(r"bytes of the masked layers: [\d,]+ dense -> [\d,]+ packed \(0\.\d{3}x\)", printed)
    assert re.search(r"a new token: \d+\.\d\d ms dense -> \d+\.\d\d ms packed", printed)
    assert f"wrote the packed model and its README.md to {made}" in printed
    verify_folder(made)


def test_the_card_says_what_was_done(made, work):
    card = (made / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert card.isascii() and max(map(len, card.split("The command")[0].splitlines())) < 200
    said = (work / "oneshot.out").read_text()
    for label, row in (
        ("dense", "dense"),
        ("pruned", r"pruned \(sparsegpt\)"),
        ("reconstructed", r"reconstructed \(blocks\)"),
        ("packed", "packed, bfloat16: this folder"),
    ):
        value = re.search(rf"  {label} +(\d+\.\d{{4}})", said)[1]
        assert re.search(rf"^\| {row} \| {re.escape(value)} \|", card, re.M)
    again = f"patch-llm oneshot --model {work}/model --data {work}/train.txt --sparsity 0.45 --out {made} --nsamples 4"
    assert f"```\n{again} --seqlen 32 --tile 64,64 --reorder --heldout-windows 2\n```" in card
    assert "4 samples of 32 tokens (128 tokens) of a text with SHA-256" in card
    assert re.search(r"2 windows of 32 tokens: the last 64 of [\d,]+ tokens of .*, cut off before calibration", card)
    assert re.search(
        r"Mean relative error of the blocks' outputs on the calibration text: 0\.\d{5}, 0\.\d{5} after", card
    )
    assert 'model = patch.load("oneshot")' in card and f"torch {torch.__version__}" in card
    assert "\nBefore, the channels that 4 layers read and the residual stream were reordered, which changes no" in card
    assert "base_model" not in card  # the model is a folder here


def test_kept_stages_are_artifacts_of_the_model(made, work, capsys):
    stages = made.with_name("oneshot.stages")
    assert sorted(path.name for path in stages.iterdir()) == STAGES
    masks, weights = "--masks {s}/reconstruct", "export --model {s}/reordered --format packed --dtype bf16"
    arguments = f"{weights} {masks} --out {{w}}/exported".format(w=work, s=stages).split()
    assert run(capsys, *arguments)[0] == 0
    exported, packed = (dict(patch.load(path).state_dict()) for path in (work / "exported", made))
    assert exported.keys() == packed.keys()
    assert all(torch.equal(exported[name], packed[name]) for name in packed)
    dense, reordered = patch.load(work / "model"), patch.load(stages / "reordered")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        difference = (reordered(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
    assert 0 < difference < 1e-5
    for name in ("prune", "reconstruct"):
        artifact = load_artifact(stages / name, model=reordered)
        assert artifact.masks.keys() == maskable_linears(reordered).keys()
        with pytest.raises(ValueError, match="model"):
            load_artifact(stages / name, model=dense)


@pytest.mark.parametrize("stopped", DONE)
def test_an_interrupted_job_goes_on_where_it_stopped(made, work, tmp_path, capsys, monkeypatch, stopped):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    out = tmp_path / "o"
    with monkeypatch.context() as patched:
        patched.setattr(job, stopped, interrupt)
        status, _, err = call(capsys, work, "--out", out)
    done = DONE[stopped]
    assert status == 130
    kept = f"what is finished ({', '.join(done)}) is kept in {out}.stages; run the same command again to go on"
    assert err.endswith(f"patch-llm: interrupted: {kept}\n")
    assert not out.exists()
    status, _, err = call(capsys, work, "--out", out)
    assert status == 0
    said = [line for line in err.splitlines() if line.startswith("stage ")]
    assert said == [
        f"stage {number} of 5, {name}{': done before' if name in done else ''}"
        for number, name in enumerate(job.STAGES, 1)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_an_interrupt_inside_a_stage_keeps_its_parts(made, work, tmp_path, capsys, monkeypatch):
    out, fitted, blocks = tmp_path / "o", block_fit.fit_block, []

    def stop_at_the_second(index, *arguments, **settings):
        if index == 1:
            raise KeyboardInterrupt
        blocks.append(index)
        fitted(index, *arguments, **settings)

    monkeypatch.setattr(reconstruction, "fit_block", stop_at_the_second)
    status, _, err = call(capsys, work, "--out", out)
    assert status == 130
    assert f"what is finished (dense, reorder, prune, parts of reconstruct) is kept in {out}.stages" in err

    def count(index, *arguments, **settings):
        blocks.append(index)
        fitted(index, *arguments, **settings)

    monkeypatch.setattr(reconstruction, "fit_block", count)
    status, _, err = call(capsys, work, "--out", out)
    assert status == 0 and blocks == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_an_interrupt_inside_the_search_leaves_no_stage_of_it(work, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(permutation, "best_order", interrupt)
    status, _, err = call(capsys, work, "--out", tmp_path / "o")
    assert status == 130
    assert f"what is finished (dense) is kept in {tmp_path / 'o'}.stages" in err
    assert [path.name for path in (tmp_path / "o.stages").iterdir()] == ["dense"]


@pytest.mark.usefixtures("stages")
def test_channels_keep_their_order_unless_asked(work, stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "reordered", lambda *_, **__: pytest.fail("reordered"))
    more = ["--keep-stages", "--reconstruct", "least_squares"]
    status, _, err = call(capsys, work, "--out", tmp_path / "o", *more, text=COMMAND)
    assert status == 0
    assert "plan: prune with sparsegpt, " in err and "reorder" not in err
    assert re.findall(r"^stage .*", err, re.M) == [
        *("stage 1 of 4, dense: done before", "stage 2 of 4, prune", "stage 3 of 4, reconstruct", "stage 4 of 4, pack"),
    ]
    card = (tmp_path / "o" / "README.md").read_text()
    assert "--reorder" not in card and "reordered" not in card
    assert not (stages / "reordered").exists()
    load_artifact(stages / "reconstruct", model=patch.load(work / "model"))


def test_a_model_without_movable_channels_goes_on(work, tmp_path, capsys):
    config = transformers.GPTNeoXConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    build_byte_tokenizer().save_pretrained(tmp_path / "neox")
    more = ["--model", tmp_path / "neox", "--out", tmp_path / "o", "--reconstruct", "least_squares", "--keep-stages"]
    status, _, err = call(capsys, work, *more)
    assert status == 0
    assert "plan: prune with sparsegpt, " in err and "reorder 0" not in err
    assert err.count("channels of GPTNeoXForCausalLM stay in their order: none is known that can be moved\n") == 1
    assert "reordered" not in (tmp_path / "o" / "README.md").read_text()
    stages = tmp_path / "o.stages"
    assert sorted(path.name for path in stages.iterdir()) == ["dense", "prune", "reconstruct", "reorder"]
    load_artifact(stages / "reconstruct", model=patch.load(tmp_path / "neox"))


def test_too_little_memory_is_said_in_flags(made, work, stages, tmp_path, capsys, monkeypatch):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    shutil.rmtree(stages / "reconstruct")
    monkeypatch.setattr(reconstruction, "fit_block", full)
    status, _, err = call(capsys, work, "--batch-size", 8, "--out", tmp_path / "o")
    assert status == 2
    expected = "--batch-size: expected memory to fit block 0 to so many samples a step, got too little for 8 of 32"
    advice = "Give --batch-size 4, shorter ones such as --seqlen 16, or --reconstruct least_squares."
    assert err.endswith(f"{expected} tokens. {advice}\n")


def test_an_interrupt_before_the_first_stage_leaves_nothing(work, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "heldout_perplexity", interrupt)
    status, _, err = call(capsys, work, "--out", tmp_path / "o")
    assert status == 130
    assert f"interrupted: nothing was written to {tmp_path / 'o'}; run the same command again" in err
    monkeypatch.setattr(command, "_plan", interrupt)
    status, _, err = run(capsys, "oneshot", "--model", work / "model", "--dry-run")
    assert status == 130 and "interrupted: nothing was started" in err


@pytest.fixture
def stages(made, tmp_path):
    """A copy of the finished stages beside an output folder that is not there."""
    shutil.copytree(made.with_name("oneshot.stages"), tmp_path / "o.stages")
    return tmp_path / "o.stages"


def done_before(err):
    return re.findall(r"^stage \d of 5, (\w+): done before$", err, re.M)


def test_a_damaged_stage_is_made_again(made, work, stages, tmp_path, capsys, caplog):
    (stages / "prune" / "masks.safetensors").write_bytes(b"damaged")
    status, _, err = call(capsys, work, "--out", tmp_path / "o")
    assert status == 0
    assert done_before(err) == ["dense", "reorder", "reconstruct"]
    assert "making stage prune again: " in caplog.text and "masks.safetensors: expected" in caplog.text
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (["--sparsity", "0.35"], ["dense", "reorder"]),
        (["--nsamples", "3"], ["dense"]),
        (["--batch-size", "2"], ["dense", "reorder", "prune"]),
        (["--dtype", "bf16"], []),
        (["--heldout", "{w}/held.txt"], []),
        (["--model", "{w}/another"], []),
    ],
)
@pytest.mark.usefixtures("stages")
def test_what_changed_is_made_again_with_all_that_follows(work, tmp_path, capsys, monkeypatch, more, kept):
    if more[0] == "--model":
        build_tiny_model("llama", seed=1).save_pretrained(work / "another")
        build_byte_tokenizer().save_pretrained(work / "another")

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(job._Run, "_pack", stop)
    status, _, err = call(capsys, work, "--out", tmp_path / "o", *(part.format(w=work) for part in more))
    assert status == 130
    assert done_before(err) == kept


REFUSED = [
    (["--out", "{w}/model"], "--out: expected a new folder, {w}/model holds other files"),
    (["--out", "{w}/oneshot"], "--out: expected a new folder, {w}/oneshot exists already (a complete export)"),
    (["--out", "{w}/train.txt"], "--out: expected a folder, {w}/train.txt is a file"),
    (["--out", "{t}/used"], "--out: expected a new folder or one of an earlier run, {t}/used.stages holds other files"),
    (["--out", "{t}/file"], "--out: expected a folder, {t}/file.stages is a file"),
    (["--sparsity", "0.6"], "--sparsity: expected a share of zeros from 0 to 0.5, got 0.6. 45 percent is 0.45."),
    (["--method", "prox_sparse"], "--method: expected one of magnitude, wanda, sparsegpt, thanos, got 'prox_sparse'."),
    (["--method", "sparsegptt"], "--method: expected one of magnitude, wanda, sparsegpt, thanos, got 'sparsegptt'."),
    (
        ["--reconstruct", "least_squares", "--epochs", "2"],
        "--epochs: expected none with reconstruct least_squares, got 2. Leave it out, or use --reconstruct blocks.",
    ),
    (
        ["--reconstruct", "sparsegpt", "--batch-size", "2"],
        "--batch-size: expected none with reconstruct sparsegpt, got 2. Leave it out, or use --reconstruct blocks.",
    ),
    (["--data", "{w}/absent.txt"], "--data: expected a file (.txt, .jsonl, .parquet) or one of c4"),
    (["--heldout", "{w}/absent.txt"], "--heldout: expected a file (.txt, .jsonl, .parquet) or one of c4"),
    (
        ["--heldout", "{t}/copy.txt"],
        "--heldout: expected another text than that to calibrate on, got '{t}/copy.txt', which holds the",
    ),
    (
        ["--model", "{t}/odd"],
        "layer 'model.layers.0.mlp.down_proj', in_features for pattern tiles: expected a multiple",
    ),
    (
        ["--out", "{t}/stage"],
        "--out: expected stages of an earlier run, {t}/stage.stages/prune holds other files. Move",
    ),
    (
        ["--heldout", "{w}/train.txt"],
        "--heldout: expected another text than that to calibrate on, got '{w}/train.txt' for both.",
    ),
    (
        ["--data", "{w}/short.txt"],
        "--heldout: expected a window of 32 tokens in the last tenth of the text, {w}/short.txt has 9 tokens in all.",
    ),
    (
        ["--heldout", "{w}/short.txt"],
        "--heldout: expected at least one window of 32 tokens, '{w}/short.txt' has 9 tokens.",
    ),
    (["--seqlen", "1"], "--seqlen: expected an integer >= 2, got 1"),
    (["--seqlen", "500"], "--seqlen: expected 2 to 128 tokens (max_position_embeddings), got 500"),
    (["--exclude", "*.nothing"], "got '*.nothing' which matches none"),
    (["--device", "cuda:99"], "--device: expected a GPU that is there, got 'cuda:99'"),
    (["--model", "{w}/absent"], "--model: expected a model folder, found none"),
    (["--model", "{w}/oneshot"], "--model: expected a dense model, '{w}/oneshot' has packed layers"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=range(len(REFUSED)))
@pytest.mark.usefixtures("made")
def test_bad_input_is_refused_before_any_work(work, tmp_path, capsys, monkeypatch, more, message):
    shutil.copy(work / "train.txt", tmp_path / "copy.txt")
    build_tiny_model("llama", intermediate_size=90).save_pretrained(tmp_path / "odd")
    build_byte_tokenizer().save_pretrained(tmp_path / "odd")
    (tmp_path / "stage.stages" / "prune").mkdir(parents=True)
    (tmp_path / "stage.stages" / "prune" / "notes.txt").write_text("mine")
    (tmp_path / "used.stages").mkdir()
    (tmp_path / "used.stages" / "notes.txt").write_text("mine")
    (tmp_path / "file.stages").write_text("mine")
    before = tree(tmp_path) | tree(work)
    loaded = []
    monkeypatch.setattr("patch.cli.inputs.load_model", lambda *_, **__: loaded.append(1))
    status, _, err = call(capsys, work, "--out", tmp_path / "o", *(part.format(w=work, t=tmp_path) for part in more))
    assert status == 2
    assert message.format(w=work, t=tmp_path) in err
    assert not loaded
    assert tree(tmp_path) | tree(work) == before


def test_text_and_folder_are_needed_but_for_a_dry_run(work, capsys):
    status, _, err = run(capsys, "oneshot", "--model", work / "model")
    assert status == 2 and "expected --data, --out, got nothing. Give it as a flag" in err


def test_the_plan_comes_first(made, work):
    said = (work / "oneshot.err").read_text().splitlines()
    plan = [line.removeprefix("plan: ") for line in said if line.startswith("plan: ")]
    assert plan[0] == "14 linear layers with 0.25 M weights, 45% of them to be zero"
    assert (
        plan[1]
        == "reorder channels; prune with sparsegpt, tiles by fisher; reconstruct by blocks; on 4 samples of 32 tokens "
        "(128 tokens)"
    )
    assert re.fullmatch(r"measure on 2 windows of 32 tokens: the last 64 of .* before calibration was drawn", plan[2])
    each = r"dense \d+ s, reorder \d+ s, prune \d+ s, reconstruct \d+ s, pack \d+ s"
    assert re.fullmatch(rf"about \d+ s on this machine, by a model that may be far off: {each}", plan[3])
    assert re.fullmatch(r"peak memory about 0\.\d GB", plan[4])
    assert len(plan) == 5 and said.index(f"plan: {plan[4]}") < said.index("stage 1 of 5, dense")


def test_a_dry_run_reads_the_configuration_alone(work, tmp_path, capsys):
    (tmp_path / "shapes").mkdir()
    shutil.copy(work / "model" / "config.json", tmp_path / "shapes")
    before = tree(tmp_path)
    status, out, _ = run(
        capsys, "oneshot", "--model", tmp_path / "shapes", "--dry-run", "--reorder", "--out", tmp_path / "o"
    )
    assert status == 0
    assert "plan: 14 linear layers with 0.25 M weights, 45% of them to be zero\n" in out
    assert "on 1024 samples of 128 tokens (131,072 tokens)\nplan: measure on 64 windows of 128 tokens\n" in out
    assert re.search(r"^reorder +order of the channels +\d+ \w+ +0\.\d GB$", out, re.M)
    assert re.search(r"^reconstruct +block fit +\d+ \w+ +0\.\d GB$", out, re.M)
    assert re.search(
        r"^a GPU of 24 GB: the whole model fits, 23\.\d GB left; with --offload it fits, 23\.\d GB", out, re.M
    )
    assert re.search(r"^--offload needs 0\.\d GB of host memory$", out, re.M)
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_dry_run_says_that_a_7b_fits_24_gb_with_offload(tmp_path, capsys):
    transformers.LlamaConfig(**LLAMA_7B, dtype=torch.bfloat16).save_pretrained(tmp_path)
    status, out, _ = run(capsys, "oneshot", "--model", tmp_path, "--dry-run")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("a GPU of 24 GB: "))
    assert "the whole model does not fit, " in line and "; with --offload it fits, " in line


def test_an_architecture_that_cannot_be_walked_is_not_refused(work, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("the output depends on values")

    monkeypatch.setattr("patch.pruning.counts.counted", fail)
    status, out, _ = run(capsys, "oneshot", "--model", work / "model", "--dry-run")
    assert status == 0
    assert out.splitlines()[-1] == "plan: time and memory are not known for this architecture"


@pytest.mark.usefixtures("stages")
def test_offload_gives_the_same_model(made, work, tmp_path, capsys):
    """Where the model is has no influence; a model that is not in one place is not timed."""
    status, out, _ = call(capsys, work, "--out", tmp_path / "o", "--offload", "--sparsity", "0.44", "--keep-stages")
    assert status == 0
    assert "a new token: " not in out and "A new token" not in (tmp_path / "o" / "README.md").read_text()
    status, out, _ = call(capsys, work, "--out", tmp_path / "p", "--sparsity", "0.44")
    assert status == 0 and "a new token: " in out
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("o", "p"))
    assert one == two


def test_logits_that_differ_are_no_result(work, tmp_path, capsys, monkeypatch):
    """As of a kernel that is wrong: what is saved is not the model that was packed."""
    opened = job.open_as

    def other(*arguments):
        model = opened(*arguments)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2)
        return model

    monkeypatch.setattr(job, "open_as", other)
    status, _, err = call(capsys, work, "--out", tmp_path / "o")
    assert status == 1
    assert "expected the logits of the saved model, they differ by up to" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.stages"]


def rewrite(folder, content):
    write_folder(folder, lambda new: [(new / name).write_bytes(data) for name, data in content.items()])


@pytest.mark.parametrize("dense", [2.0, 1000.0])
def test_a_bad_result_is_said_in_capitals(work, stages, tmp_path, capsys, monkeypatch, dense):
    monkeypatch.setattr(job, "vocabulary_size", lambda model: None)  # an untrained model guesses
    for name in ("dense", "prune"):
        stage = json.loads((stages / name / "stage.json").read_text())
        stage["result"]["perplexity"] = dense if name == "dense" else 1e4
        content = {path.name: path.read_bytes() for path in (stages / name).iterdir()}
        content |= {"stage.json": json.dumps(stage).encode()}
        del content["patch_manifest.json"]
        rewrite(stages / name, content)
    status, out, _ = call(capsys, work, "--out", tmp_path / "o")
    assert status == 0
    card = (tmp_path / "o" / "README.md").read_text()
    next_step = f"next: patch-llm generate --model {tmp_path / 'o'} --prompt 'Once'"
    if dense == 2.0:
        warning = re.search(r"WARNING: the result's perplexity is \d+\.\d\d times the dense model's\. .*", out)[0]
        assert f"**{warning}**" in card and next_step not in out
    else:
        assert "WARNING" not in out + card and next_step in out


def test_an_earlier_export_is_replaced_when_asked(made, work, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "o")
    (tmp_path / "o" / "README.md").unlink()
    shutil.copytree(made.with_name("oneshot.stages"), tmp_path / "o.stages")
    status, _, _ = call(capsys, work, "--out", tmp_path / "o", "--overwrite")
    assert status == 0
    assert (tmp_path / "o" / "README.md").is_file() and not (tmp_path / "o.stages").exists()
