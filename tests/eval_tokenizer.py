"""A tokenizer for tests of prompts: one id for each word, number, space or mark; no file, no network."""

import re


class WordTokenizer:
    """Ids in the order of first sight. Splits words with their space before, and digits one by one."""

    eos_token_ids = (0,)

    def __init__(self) -> None:
        self.texts, self.ids = ["<end>"], {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall(r" ?[^\W\d_]+|\d|\n|.", text)
        for piece in pieces:
            if piece not in self.ids:
                self.ids[piece] = len(self.texts)
                self.texts.append(piece)
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(self.texts[int(i)] for i in ids if i or not skip_special_tokens)

    def apply_chat_template(self, messages, *, add_generation_prompt=True, continue_final_message=False):
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return self.encode(text if continue_final_message else text + "<assistant>")


class NumberTokenizer(WordTokenizer):
    """Replies are the ids themselves: a random model writes words that nobody has seen."""

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if i or not skip_special_tokens)

    def digest(self) -> str:
        """Its words are no part of it: it learns them as it goes."""
        return "numbers"
