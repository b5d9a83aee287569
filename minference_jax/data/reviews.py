"""Made-up customer reviews in English and Korean, with what they are about and whether they praise it."""

from __future__ import annotations

import random
from typing import Any

_TOPICS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "en": {
        "quality": (
            ("The quality is excellent", "Solid quality, it feels made to last", "I am delighted with the quality"),
            ("The quality is poor", "It broke within a week, no quality at all", "Cheap quality, the seams came apart"),
        ),
        "price": (
            ("A fair price", "The price could not be better", "Worth every cent of its price"),
            ("The price is far too high", "Not worth the price", "I found a lower price elsewhere"),
        ),
        "service": (
            ("The service answered within an hour", "Friendly service", "The service replaced it at once"),
            ("The service never answered", "Rude service", "I waited three weeks for the service"),
        ),
        "delivery": (
            ("The delivery was a day early", "Quick delivery", "The delivery came well packed"),
            ("The delivery was two weeks late", "The delivery went to the wrong house", "A damaged delivery"),
        ),
    },
    "ko": {
        "품질": (
            ("품질이 정말 좋아요", "품질이 기대 이상입니다"),
            ("품질이 너무 나빠요", "품질이 엉망이라 금방 망가졌어요"),
        ),
        "가격": (("가격이 저렴해요", "가격에 비해 만족스러워요"), ("가격이 너무 비싸요", "가격만큼의 값어치가 없어요")),
        "배송": (("배송이 빨라요", "배송이 하루 만에 왔어요"), ("배송이 너무 늦어요", "배송 중에 상자가 찢어졌어요")),
    },
}


def make_reviews(count: int = 2_000, seed: int = 0) -> list[dict[str, Any]]:
    """`count` reviews as rows: `text`, `language` ("en" or "ko"), `about` (a topic, or two) and `label` ("positive" or
    "negative"). A quarter is Korean. The same seed gives the same ones."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    numbers, rows = random.Random(seed), []
    for _ in range(count):
        language = "ko" if numbers.random() < 0.25 else "en"
        topics = numbers.sample(sorted(_TOPICS[language]), numbers.randint(1, 2))
        label = numbers.choice(("positive", "negative"))
        said = [numbers.choice(_TOPICS[language][topic][label == "negative"]) for topic in topics]
        rows.append({"text": ". ".join(said) + ".", "language": language, "about": topics, "label": label})
    return rows
