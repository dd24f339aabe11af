"""The figures that arXiv 2606.07604 prints, for comparison with the computed ones."""

from __future__ import annotations

from captum_cw.analysis.components import PRODUCTS

PAPER = "arXiv 2606.07604"

#: The rows of Table 5, in the order of the values below.
ENTROPIES = ("attention", "vw", "contribution")
WITHOUT_FIRST = tuple(f"{measure}, without first" for measure in ENTROPIES)

#: The printed figures by item, by column of its table, and by row.
PRINTED: dict[str, dict[str, dict[str, float]]] = {
    "T1": {
        f"{group}, printed (LLaMA-3.1-8B, FineWeb-Edu)": dict(zip(PRODUCTS, values, strict=True))
        for group, values in {
            "all": (0.055, 0.000, 0.036, 0.489, 0.305, 0.020),
            "first": (0.079, 0.027, 0.518, 0.157, 0.611, 0.725),
            "others": (0.449, 0.000, 0.028, 0.579, 0.834, 0.021),
        }.items()
    },
    "T3": {
        f"{group}, printed (LLaMA-3.1-8B, GSM8K)": dict(zip(PRODUCTS, values, strict=True))
        for group, values in {
            "all": (0.060, 0.000, 0.034, 0.511, 0.303, 0.026),
            "first": (0.085, 0.022, 0.496, 0.145, 0.602, 0.689),
            "others": (0.455, 0.000, 0.028, 0.587, 0.863, 0.026),
        }.items()
    },
    "T2": {
        "printed (LLaMA-3.1-8B)": {
            "attention, relative norm": -0.287,
            "attention, cosine": 0.147,
            "relative norm, cosine": -0.070,
        }
    },
    # The printed row of LLaMA-3B repeats that of LLaMA-8B, so it is left out.
    "T4": {
        "printed, LLaMA-1B": {"attention": 0.632, "vw": 0.147, "contribution": 0.243},
        "printed, LLaMA-8B": {"attention": 0.708, "vw": 0.159, "contribution": 0.142},
    },
    "T5": {
        f"printed, {model}": dict(zip(ENTROPIES + WITHOUT_FIRST, values, strict=True))
        for model, values in {
            "LLaMA-1B": (1.40, 2.15, 1.71, 2.42, 2.39, 2.14),
            "LLaMA-3B": (1.21, 2.22, 1.72, 2.54, 2.51, 2.20),
            "LLaMA-8B": (1.21, 2.30, 1.79, 2.61, 2.58, 2.27),
        }.items()
    },
    "D.6": {"printed (LLaMA-3.1-8B)": {"r": 0.949}},
    "F5a": {"printed (LLaMA-3.1-8B, about)": {"first to others": -0.2, "among others": 0.2}},
    "F5b": {
        "printed (LLaMA-3.1-8B, more than)": {"median r2 of k": 0.8, "median r2 of g": 0.7},
    },
    "F7": {"printed (LLaMA-3.1-8B)": {"mean cosine": 0.012}},
}
