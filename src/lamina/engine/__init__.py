"""Low-rank updates inside a torch model; knows no file, stage, trainer or terminal."""
