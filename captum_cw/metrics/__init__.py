"""Is it faithful? Comprehensiveness and sufficiency, by removing what scores rank."""

from captum_cw.metrics.agreement import Agreement, agreement
from captum_cw.metrics.faithfulness import (
    ComprehensivenessSufficiency,
    comprehensiveness,
    sufficiency,
)
from captum_cw.metrics.result import Comparison, FaithfulnessResult
from captum_cw.metrics.sanity import with_shuffled_weights

__all__ = [
    "Agreement",
    "Comparison",
    "ComprehensivenessSufficiency",
    "FaithfulnessResult",
    "agreement",
    "comprehensiveness",
    "sufficiency",
    "with_shuffled_weights",
]
