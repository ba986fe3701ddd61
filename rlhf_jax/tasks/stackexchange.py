"""StackExchange: technical questions, as in Elastic Reset (arXiv 2312.07551; LLaMA-7B with LoRA, after StackLLaMA).

A row holds `question` and two answers, `response_j` with more votes than `response_k`. The reward is the logit of a
model trained on such pairs. Drift is the policy's perplexity on human answers, the mean over windows unweighted
(`perplexity.perplexity(..., weighted=False)`); the tax on other abilities is HumanEval's pass@k (`humaneval.py`).
"""
import math
from collections.abc import Mapping, Sequence

FIELDS = ('question', 'response_j', 'response_k')
MAX_PROMPT = 511  # "fewer than 512"


def prompt(question: str) -> str:
    return f'Question: {question}\n\nAnswer: '


def conversation(question: str, answer: str) -> str:
    """A question with an answer: what fine-tuning, the reward model and the measure of drift read."""
    return prompt(question) + answer


def pair(row: Mapping[str, str]) -> tuple[str, str]:
    """The conversations of a row for the reward model, the better first.

    Published runs left out rows of which either has more than 512 tokens.

    Raises:
        ValueError: a field is missing.
    """
    for field in FIELDS:
        if row.get(field) is None:
            raise ValueError(f'missing field {field!r}; it has {sorted(row)}')
    return conversation(row['question'], row['response_j']), conversation(row['question'], row['response_k'])


def pairs(question: str, answers: Sequence[str], votes: Sequence[float],
          max_pairs: int | None = None) -> list[dict[str, str]]:
    """Rows from all answers to a question: each with each that has fewer votes; equal votes make no pair.

    Args:
        max_pairs: the first so many, in the order of the better answer's votes, then of the worse one's, highest first.

    Raises:
        ValueError: not as many votes as answers.
    """
    if len(answers) != len(votes):
        raise ValueError(f'votes: there are {len(votes)} for {len(answers)} answers')
    order = sorted(range(len(answers)), key=lambda i: -votes[i])
    rows = [{'question': question, 'response_j': answers[j], 'response_k': answers[k]}
            for n, j in enumerate(order) for k in order[n + 1:] if votes[j] > votes[k]]
    return rows[:max_pairs]


# ---- HumanEval -----------------------------------------------------------------------------------------------------



def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples is right, unbiased from n samples of which c are: 1 - C(n-c, k) / C(n, k)
    (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: `num_correct` or k outside of `num_samples`.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f'num_samples={num_samples}, num_correct={num_correct}, k={k}: need 0 <= c <= n, 1 <= k <= n')
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
