"""The argument names of the original PATCH code, read into our own settings; for the faces patch.utils and others."""
