"""Held-out evaluation: the policy answers prompts it never trains on; the same judge and reward score the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarubric.evaluate.summary import Example, Summary, summarize
from megarubric.recipe.experience import Answer, reward_answers, write_and_judge

if TYPE_CHECKING:
    from megarubric.launch.run import Run

EXAMPLES = 8  # answers kept for reading, the first of as many prompts


async def evaluate(run: Run, step: int) -> Summary:
    """Summary of `evaluate.samples_per_prompt` answers to every held-out prompt.

    Seeds do not depend on `step`: evaluations of one run draw with the same randomness, so they differ by the policy.
    """
    assert run.eval_sampler is not None and run.system.judge is not None
    answers, _ = await write_and_judge(run.eval_sampler, run.system.judge, run.tokenizer, 0, run.heldout)
    return summary_of(reward_answers(answers))


def summary_of(answers: list[Answer]) -> Summary:
    """What scored answers amount to, with the first answer of the first prompts as examples."""
    results = [a.result for a in answers if a.result is not None]
    examples = [
        Example(a.sample.prompt.id, a.sample.prompt.text, a.text, a.reward, a.result.veto if a.result else None)
        for a in answers
        if a.sample.index == 0
    ][:EXAMPLES]
    return summarize([a.judgements for a in answers], results, [a.text for a in answers], examples)
