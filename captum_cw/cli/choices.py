"""The values of options.

The library has the same names, but importing it imports torch, and ``--help`` and completion would
wait for seconds. A test compares the two.
"""

DATA = ("boolq", "fineweb-edu", "gsm8k", "lambada", "mmlu", "wikitext", "winogrande")
DTYPES = ("float32", "bfloat16", "float16")
REDUCTIONS = ("mean", "sum", "max", "rms")
SCORINGS = ("online", "clean")
RANKINGS = ("layer", "global", "head")
RATES_OF = ("removable", "all")
QUANTITIES = ("perplexity", "nll", "log_prob", "prob", "kl")
GRANULARITIES = ("pair", "token")
STATES = ("normed", "residual", "key", "value")
STARTS = ("auto", "always", "never")
#: The endings of names that are those of files, and not of folders.
FILES = (
    *(".csv", ".htm", ".html", ".json", ".jsonl", ".md", ".parquet", ".pdf", ".png", ".svg"),
    ".txt",
)
#: Of ``attribute --data``: tokens of a text, tokens of a batch, and texts of a file.
LENGTH, BATCH_TOKENS, SHARD_SIZE = 512, 4096, 512
PRESETS = ("quick", "full", "paper")
ITEMS = (
    *("F1", "F2", "F3", "F4", "F9a", "F9", "F10", "across", "T1", "T3", "T2", "F7", "T4", "T5"),
    *("D.6", "F5a", "F5b", "F5c", "F6", "selection", "regimes", "assumptions", "frames"),
)
