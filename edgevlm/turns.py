"""A conversation → segments, by the templates in bundle.json's "prompt".

What families share: words around each turn and each picture. A family adds what stands in the
picture's own place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgevlm.bundle import check_shape
from edgevlm.errors import BundleError, PromptError
from edgevlm.prompt import Message, Segment, Text

CONTENT = "{content}"
NUMBER = "{n}"  # in the words around a picture: which picture of the conversation, from 1
_SHAPE = {
    "bos": bool,
    "system": str,  # opens a conversation that has no system message
    "user": str,
    "assistant": str,
    "generate": str,
    "image": str,
    "image_token": str,
    "describe": {"short": str, "normal": str, "long": str},
}


class Turns:
    """`tight` templates have no space between the name of a role and a picture; in `interleaved`
    ones the words of a turn may say by the image token where its pictures belong."""

    def __init__(
        self,
        path: Path,
        section: Mapping[str, Any],
        *,
        tight: bool = False,
        interleaved: bool = False,
    ) -> None:
        """Raises BundleError when templates are missing or lack the place for their content."""
        check_shape(path, section, _SHAPE)
        self._slot: str = section["image_token"]
        if "image_mark" in section:  # where no token stands for a picture
            check_shape(path, section, {"image_mark": str})
            self._slot = section["image_mark"]
        marks = {"user": CONTENT, "assistant": CONTENT, "image": self._slot}
        if "system_turn" in section:  # around a system message; else that is told as a user's
            check_shape(path, section, {"system_turn": str})
            marks["system_turn"] = CONTENT
        for key, mark in marks.items():
            if not mark or section[key].count(mark) != 1:
                raise BundleError(f"{path}: the prompt's {key!r} must hold {mark!r} once")
        self._prompt = section
        self._tight = tight
        self._interleaved = interleaved
        self._around_image: tuple[str, ...] = tuple(section["image"].split(self._slot))

    def segments(
        self, messages: Sequence[Message], picture: Callable[[int], Sequence[Segment]]
    ) -> list[Segment]:
        """The conversation, ready for an answer; `picture` gives what stands for a picture.

        Raises:
            PromptError: the words have places for another number of pictures.
        """
        segments: list[Segment] = []
        if not messages or messages[0].role != "system":
            segments.append(Text(self._prompt["system"]))
        n_pictures = 0
        for message in messages:
            before, after = self._around(message.role)
            segments.append(Text(before.rstrip(" ") if self._tight and message.images else before))
            first, *others = self._words(message)
            segments.append(Text(first))
            for index, words in zip(message.images, others, strict=True):
                n_pictures += 1
                ahead, behind = (
                    Text(around.replace(NUMBER, str(n_pictures))) for around in self._around_image
                )
                segments += [ahead, *picture(index), behind, Text(words)]
            segments.append(Text(after))
        segments.append(Text(self._prompt["generate"]))
        return [s for s in segments if not isinstance(s, Text) or s.text]

    def _words(self, message: Message) -> list[str]:
        """What stands before, between and after the pictures of a message."""
        words, slot = message.text.strip(), self._slot
        if not self._interleaved or not message.images:
            return ["" for _ in message.images] + [words]
        if slot not in words:
            words = f"{slot * len(message.images)} {words}"
        parts: list[str] = words.split(slot)
        if len(parts) - 1 != len(message.images):
            raise PromptError(
                f"the question has {len(parts) - 1} places {slot} for {len(message.images)} "
                "pictures: one each, or none"
            )
        return parts

    def describe(self, length: str) -> str:
        """The question that asks for a description: "short", "normal" or "long"."""
        questions: Mapping[str, str] = self._prompt["describe"]
        if length not in questions:
            raise PromptError(f"length is {length!r}; it must be one of {', '.join(questions)}")
        return questions[length]

    def _around(self, role: str) -> tuple[str, str]:
        key = "system_turn" if role == "system" else role
        template: str = self._prompt.get(key, self._prompt["user"])
        before, after = template.split(CONTENT)
        return before, after
