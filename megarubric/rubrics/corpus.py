"""Many rubrics: look-up by id, tag, scope and family, and samples that do not depend on file order."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from megarubric.errors import BadInput
from megarubric.rubrics.schema import Rubric


class Corpus:
    """Rubrics with distinct ids, in the order they were read.

    Args:
        rubrics: the rubrics.
        sources: where each comes from ("FILE: line 7"), for messages.
        name: how messages call the corpus; the path it was read from.

    Raises:
        BadInput: two rubrics have one id; names both places.
    """

    def __init__(self, rubrics: Iterable[Rubric], sources: Sequence[str] = (), name: str = "corpus") -> None:
        self.rubrics: tuple[Rubric, ...] = tuple(rubrics)
        self.sources: tuple[str, ...] = tuple(sources) or tuple(f"{name}: rubric {i}" for i in range(len(self.rubrics)))
        self.name = name
        self._position: dict[str, int] = {}
        for i, rubric in enumerate(self.rubrics):
            first = self._position.setdefault(rubric.id, i)
            if first != i:
                reason = f"the id is taken already, by {self.sources[first]}"
                raise BadInput(self.sources[i], f"rubric {rubric.id}", reason)

    def __len__(self) -> int:
        return len(self.rubrics)

    def __iter__(self) -> Iterator[Rubric]:
        return iter(self.rubrics)

    def __contains__(self, rubric_id: object) -> bool:
        return rubric_id in self._position

    def get(self, rubric_id: str) -> Rubric:
        """The rubric of that id. Raises BadInput when there is none."""
        position = self._position.get(rubric_id)
        if position is None:
            near = (i for i in self._position if i[:2] == rubric_id[:2])  # comparing with all takes seconds
            close = difflib.get_close_matches(rubric_id[:200], list(itertools.islice(near, 500)), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise BadInput(self.name, f"rubric {rubric_id[:200]}", f"no such rubric{hint}")
        return self.rubrics[position]

    def source(self, rubric_id: str) -> str:
        """Where the rubric was read ("FILE: line 7"). Raises BadInput when there is no such rubric."""
        return self.sources[self._position[self.get(rubric_id).id]]

    def by_tag(self, tag: str) -> tuple[Rubric, ...]:
        """The rubrics that carry `tag`, in corpus order."""
        return self._tags.get(tag, ())

    def by_scope(self, scope: str) -> tuple[Rubric, ...]:
        """The rubrics of `scope`, in corpus order."""
        return self._scopes.get(scope, ())

    def by_family(self, family: str) -> tuple[Rubric, ...]:
        """The rubrics of `family`, in corpus order."""
        return self._families.get(family, ())

    @functools.cached_property
    def _tags(self) -> dict[str, tuple[Rubric, ...]]:
        return _index((tag, rubric) for rubric in self for tag in dict.fromkeys(rubric.tags))

    @functools.cached_property
    def _scopes(self) -> dict[str, tuple[Rubric, ...]]:
        return _index((rubric.scope, rubric) for rubric in self)

    @functools.cached_property
    def _families(self) -> dict[str, tuple[Rubric, ...]]:
        return _index((rubric.family, rubric) for rubric in self if rubric.family is not None)

    def sample(self, n: int, seed: int) -> list[Rubric]:
        """`n` different rubrics. The draw depends on the seed and the ids alone: the n smallest SHA-256("seed:id"), so
        the order of files does not matter, and a sample of n is the beginning of a sample of n + 1.

        Raises BadInput when the corpus has fewer than `n`.
        """
        if not 0 <= n <= len(self):
            raise BadInput(self.name, f"sample of {n}", f"the corpus has {len(self)} rubrics")

        def rank(rubric: Rubric) -> bytes:
            return hashlib.sha256(f"{seed}:{rubric.id}".encode()).digest()

        return sorted(self.rubrics, key=rank)[:n]


def _index(pairs: Iterable[tuple[str, Rubric]]) -> dict[str, tuple[Rubric, ...]]:
    lists: defaultdict[str, list[Rubric]] = defaultdict(list)
    for key, rubric in pairs:
        lists[key].append(rubric)
    return {key: tuple(rubrics) for key, rubrics in lists.items()}
