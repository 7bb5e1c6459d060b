"""Held-out evaluation: the policy answers prompts it never trains on; the same judge and reward score the answers."""

from __future__ import annotations

from collections.abc import Sequence

from megarubric.evaluate.summary import Example, Summary, summarize
from megarubric.judging.judge import Judge
from megarubric.recipe.experience import Answer, reward_answers, write_and_judge
from megarubric.rollout.data import ChatTokenizer, Prompt
from megarubric.rollout.sampler import Sampler

EXAMPLES = 8  # answers kept for reading, the first of as many prompts


async def evaluate(sampler: Sampler, judge: Judge, tokenizer: ChatTokenizer, prompts: Sequence[Prompt]) -> Summary:
    """Summary of the sampler's answers to `prompts`.

    Always draws as step 0: evaluations of one run have the same seeds, so they differ by the policy only.
    """
    answers, _ = await write_and_judge(sampler, judge, tokenizer, 0, prompts)
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
