"""Words to draw keys from: adjectives and nouns for needles, and the words of a text."""

from __future__ import annotations

import random
import re
from functools import lru_cache


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words("""
    amber ancient angular arctic autumn bashful blazing bold brave bright brisk calm candid careful clever
    cloudy copper cosmic crimson curious dapper daring distant dusty eager early elegant emerald faithful
    famous fancy fearless fierce floral fluffy frosty gentle giant gilded glossy golden graceful grand hasty
    hollow honest humble icy idle ivory jolly keen kind lively lonely lucky lunar mellow merry mighty misty
    modest narrow nimble noble olive orange pale patient plain playful polite proud purple quick quiet rapid
    rare restless rustic salty scarlet secret shiny silent silver simple slender smooth snowy solid steady
    sunny swift tender tidy tiny vivid warm wild windy wise wooden yellow young
""")
NOUNS = _words("""
    acorn anchor apron arrow badger balcony banjo barrel basket beacon bell blanket boulder bridge bucket
    button cabin candle canyon castle cellar chimney circle clover comet compass cottage cradle crystal dagger
    desert dolphin dragon drum eagle ember engine falcon feather fiddle forest fountain galaxy garden glacier
    goblet hammer harbor harvest hazel helmet hermit island jacket jungle kettle ladder lagoon lantern lemon
    lizard magnet maple marble meadow mirror monk mountain needle nest oasis orchard otter paddle palace
    parrot pebble pepper piano pigeon pillow pocket puzzle quilt rabbit raven ribbon river rocket saddle
    sailor shadow shepherd spider statue temple thunder ticket tiger tower tunnel valley violin walnut wagon
    whale willow window wizard
""")


def random_key(numbers: random.Random) -> str:
    """An adjective and a noun, such as `gilded-otter`."""
    return f"{numbers.choice(ADJECTIVES)}-{numbers.choice(NOUNS)}"


@lru_cache(maxsize=8)
def words_of(text: str, shortest: int = 4, longest: int = 12) -> tuple[str, ...]:
    """The distinct lower-case words of a text, in alphabetical order; names, which have a capital, are left out."""
    found = set(re.findall(r"\b[a-z]+\b", text))
    return tuple(sorted(word for word in found if shortest <= len(word) <= longest))
