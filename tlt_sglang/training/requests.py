"""Requests as people write them, composed of the forms and subjects in requests.json.

Beside what a model makes up: a small model's own requests are vaguer, and easier to answer, than
those it gets. Five thousand different ones come of it, and no two forms lead to the same answer.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter

Subjects = Mapping[str, Sequence[object]]
"""Words, numbers or pairs by the names that stand in the braces of a form."""


def compose(count: int, seed: int) -> Iterator[str]:
    """Return `count` different requests, of every form in turn; fewer if there are not so many."""
    rng = random.Random(seed)
    requests = _requests_by_form()
    for one_form in requests:
        rng.shuffle(one_form)
    turns = itertools.zip_longest(*requests)
    composed = (request for turn in turns for request in turn if request is not None)
    return itertools.islice(composed, count)


def _requests_by_form() -> list[list[str]]:
    """Return every request, a list for each form."""
    content = json.loads(Path(__file__).with_name("requests.json").read_text(encoding="utf-8"))
    subjects = content["subjects"]
    for name, singular in (("two people", "person"), ("two animals", "animal")):
        subjects[name] = list(itertools.combinations(subjects[singular], 2))
    return [_fill(form, subjects) for form in content["forms"]]


def _fill(form: str, subjects: Subjects) -> list[str]:
    """Return `form` with each choice of subjects.

    `{job or animal}` takes the subjects of both lists, `{pair[0]}` the first part of a subject.
    """
    fields = [field.partition("[")[0] for _, field, _, _ in Formatter().parse(form) if field]
    names = list(dict.fromkeys(fields))
    choices = [[word for part in name.split(" or ") for word in subjects[part]] for name in names]
    return [
        form.format(**dict(zip(names, words, strict=True))) for words in itertools.product(*choices)
    ]
