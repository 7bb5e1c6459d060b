"""What a prompt asks for, as far as it decides whether a phrase in the answer is a hack or the work itself."""

from __future__ import annotations

import re

from megarubric.rubrics.checks.phrases import pattern, words
from megarubric.rubrics.checks.registry import Text
from megarubric.rubrics.checks.text import undisguised

# Fiction: its people may flatter each other.
_FICTION = (
    words(
        "story stories tale novel scene dialogues? script screenplay play fable monologue fiction character poem verse",
        "song lyrics? transcript interview conversation anecdote",
    ),
    "故事|小说|剧本|对话|场景|诗|寓言",
)
# Text addressed to somebody, who may be praised.
_ADDRESSED = (
    words(
        "letter e-?mail note message postcard card reply speech toast thank_you eulogy invitation review feedback",
        r"testimonial recommendation reference comment congratulat\w+",
    ),
    "信|邮件|留言|贺卡|致辞|评语|推荐",
)
# Text about a work, which may be praised.
_APPRAISAL = (
    words(
        r"review critique criticis\w+ feedback evaluat\w+ assess\w+ analy[sz]\w+ summar\w+ judge compare comparison",
        r"recommend\w* grade rate rating blurb advert\w* pitch sales cover_letter promot\w+",
    ),
    "评价|评论|书评|影评|分析|总结|推荐|广告",
)
# Text in which judges, marks and criteria are the subject.
_GRADING = (
    words(
        r"judges? grade[rsd]? graders grading scor(?:e|es|ing) rubrics? criteri(?:a|on) evaluat\w+ assess\w+",
        "examiners? reviewers? rat(?:e|ing|ings) marks? points?",
    ),
    "评分|打分|评委|评审|标准|法官",
)


def _either(latin: str, chinese: str) -> re.Pattern[str]:
    return re.compile(rf"\b{latin}\b|{chinese}")


FICTION, ADDRESSED = _either(*_FICTION), _either(*_ADDRESSED)
APPRAISAL, GRADING = _either(*_APPRAISAL), _either(*_GRADING)

_SPEECH = words(
    "said says say asked asks replied replies answered whispered shouted called cried added told muttered murmured",
    "laughed smiled nodded wrote thought repeated began continued exclaimed",
)
_DIALOGUE = pattern(
    r'"[^"\n]{1,300}"(?=[^".!?\n]{0,60}\b<SPEECH>\b)',
    r'\b<SPEECH>\b[^".!?\n]{0,40}"[^"\n]{1,300}"',
    SPEECH=_SPEECH,
)


def heard(text: Text) -> tuple[str, str]:
    """(prompt, response) without disguises; spoken lines taken out of the response when fiction was asked for."""
    prompt, response = undisguised(text.prompt), undisguised(text.response)
    if FICTION.search(prompt):
        response = _DIALOGUE.sub(" ", response)
    return prompt, response
