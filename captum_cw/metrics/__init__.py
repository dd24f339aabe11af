"""Measure the faithfulness of scores, by removing the tokens that they rank."""

from captum_cw.metrics.agreement import Agreement, agreement
from captum_cw.metrics.faithfulness import (
    ComprehensivenessSufficiency,
    comprehensiveness,
    sufficiency,
)
from captum_cw.metrics.result import Comparison, FaithfulnessResult
from captum_cw.metrics.sanity import with_shuffled_weights
from captum_cw.metrics.tasks import TaskResult, evaluate_tasks

__all__ = [
    "Agreement",
    "Comparison",
    "ComprehensivenessSufficiency",
    "FaithfulnessResult",
    "TaskResult",
    "agreement",
    "comprehensiveness",
    "evaluate_tasks",
    "sufficiency",
    "with_shuffled_weights",
]
