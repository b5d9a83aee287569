"""Every generator against a sample written by hand, right and wrong answers, exact lengths, readers of local files."""

import itertools
import json
import random
import re

import pytest
from eval_tokenizer import WordTokenizer

from minference_jax.eval.fill import fill_pieces, fill_text, insert_between_sentences
from minference_jax.eval.jsonl import JsonlTask, read_infinitebench, read_longbench
from minference_jax.eval.metrics import (
    all_found,
    any_found,
    code_similarity,
    first_letter,
    first_number,
    rouge_l,
    share_of_numbers,
    starts_with,
    token_f1,
    wilson,
)
from minference_jax.eval.retrieval import NOISE, repeated_digits
from minference_jax.eval.ruler_qa import RulerQuestions
from minference_jax.eval.ruler_tracing import zeta_counts
from minference_jax.eval.tasks import GROUPS, make_tasks
from minference_jax.eval.words import words_of

TEXT = "".join(f"Here stands sentence {n} of a quiet book about the sea. " for n in range(400))
WORDS = " ".join(f"{a}{b}word" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop")
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": "Ann lives in Rome.", "qas": [{"question": "Where?", "answers": [{"text": "Rome"}]}]},
                {"context": "Bob has a dog.", "qas": [{"question": "What?", "answers": [], "is_impossible": True}]},
                {"context": "Rome is old.", "qas": [{"question": "Where?", "answers": [{"text": "in Rome"}]}]},
            ]
        }
    ]
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "squad.json"
    path.write_text(json.dumps(SQUAD))
    return path


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def task(name, **files):
    return make_tasks([name], text=WORDS if name == "ruler-cwe" else TEXT, **files)[0]


def text_of(tokenizer, sample):
    return tokenizer.decode(sample.tokens)


NAMES = [
    *(f"needle-{kind}-{mode}" for kind in ("magic", "address") for mode in ("raw", "chat", "prefix")),
    *GROUPS["retrieval"],
    *GROUPS["ruler"],
]


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_one_and_wrong_ones_zero(tokenizer, questions, name):
    one = task(name, qa=(questions, questions) if "qa" in name else ())
    for index in range(3):
        sample = one.sample(tokenizer, 1024, index, seed=5)
        assert len(sample.tokens) <= 1024 and sample.max_new_tokens > 0 and sample.id == f"{name}/1024/{index}"
        right = " " + " ".join(sample.answers) + "."
        assert one.score(right, sample.answers) == 1.0
        assert one.score(" I do not know.", sample.answers) == 0.0
        assert one.score("", sample.answers) == 0.0
        text = text_of(tokenizer, sample)
        if "qa" not in name:
            assert all(answer in text for answer in sample.answers)
    again, other = (one.sample(WordTokenizer(), 1024, 2, seed) for seed in (5, 6))
    assert again == one.sample(WordTokenizer(), 1024, 2, 5) and other.tokens != again.tokens


@pytest.mark.parametrize("name", ["needle-magic-raw", "passkey", "kv"])
@pytest.mark.parametrize("count", [2, 4, 6, 10])
def test_few_samples_have_depths_all_over_the_text(tokenizer, name, count):
    depths = sorted(task(name).sample(tokenizer, 400, index, 0).about["depth"] for index in range(count))
    assert depths[0] == 0.05 and depths[-1] == 0.95 and len(set(depths)) == count
    assert max(b - a for a, b in itertools.pairwise(depths)) <= 1.8 / count


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("needle")])
@pytest.mark.parametrize("length", [255, 777])
def test_needle_prompts_have_exactly_the_length(tokenizer, name, length):
    for index in (0, 4, 9):
        sample = task(name).sample(tokenizer, length, index, 0)
        assert len(sample.tokens) == length
        assert text_of(tokenizer, sample).count(sample.answers[0]) == 1


def test_the_needle_written_out(tokenizer):
    sample = task("needle-magic-raw").sample(tokenizer, 100, 7, 0)
    (answer,) = sample.answers
    text = text_of(tokenizer, sample)
    word = text.split()[-2]
    fact = f"One of the special magic numbers for {word} is: {answer}."
    before, after = text.split(fact)
    assert before.count("sentence") == 1 and sample.about == {"depth": 0.15}
    assert after.endswith(f"\n\nOne of the special magic numbers for {word} is:")
    chat = text_of(tokenizer, task("needle-magic-prefix").sample(tokenizer, 150, 1, 0))
    assert chat.startswith("<user>") and chat.endswith(" is:") and "<assistant>One of the special magic" in chat
    assert len(answer) == 7 and answer.isdigit()


def test_the_pass_key_written_out(tokenizer):
    sample = task("passkey").sample(tokenizer, 100, 5, 0)
    (key,) = sample.answers
    assert text_of(tokenizer, sample) == (
        f"{NOISE}\nThe pass key is {key}. Remember it. {key} is the pass key.\n{NOISE}\n\nThe pass key is"
    )
    digits = repeated_digits(random.Random(1))
    assert len(digits) == 10 and any(digits[i] == digits[i + 1] for i in range(9))


def test_key_values_written_out(tokenizer):
    sample = task("kv").sample(tokenizer, 400, 1, 0)
    text, (value,) = text_of(tokenizer, sample), sample.answers
    body, question = text.split("\n\n")
    pairs = json.loads(body)
    (key,) = (key for key in pairs if pairs[key] == value)
    assert question == f'"{key}": "' and list(pairs)[-1] == key and len(pairs) > 2


def test_ruler_needles_written_out(tokenizer):
    text = text_of(tokenizer, task("ruler-niah_single_1").sample(tokenizer, 300, 5, 0))
    lines = text.split("\n")
    (needle,) = (line for line in lines if line.startswith("One of"))
    key, answer = needle.removeprefix("One of the special magic numbers for ").removesuffix(".").split(" is: ")
    assert lines[0] == "Some magic numbers are hidden in the following text. Remember them: you will be asked for them."
    assert lines[-1] == (
        f"What is the special magic number for {key} in the text? The special magic number for {key} in the text is"
    )
    assert set(lines[1:-1]) == {NOISE, needle} and len(answer) == 7
    for name, needles, answers in (("multikey_1", 4, 1), ("multivalue", 4, 4), ("multiquery", 4, 4)):
        sample = task(f"ruler-niah_{name}").sample(tokenizer, 600, 0, 0)
        assert len(sample.answers) == answers and len(sample.tokens) == 600 - 128
        assert text_of(tokenizer, sample).count("One of the special magic numbers for") == needles
    for name, keys in (("multikey_2", "numbers"), ("multikey_3", "uuids")):
        text = text_of(tokenizer, task(f"ruler-niah_{name}").sample(tokenizer, 800, 0, 0))
        body = text.split("\n")[1:-1]
        assert len(body) > 3 and all(line.startswith(f"One of the special magic {keys} for ") for line in body)


def test_ruler_keys_are_distinct_even_where_few_can_be_drawn(tokenizer, monkeypatch):
    monkeypatch.setattr("minference_jax.eval.words.ADJECTIVES", ("red", "blue"))
    monkeypatch.setattr("minference_jax.eval.words.NOUNS", ("fox", "hen"))
    for index in range(5):
        sample = task("ruler-niah_multiquery").sample(tokenizer, 600, index, 0)
        assert len(sample.answers) == 4
        assert all(key in text_of(tokenizer, sample) for key in ("red-fox", "red-hen", "blue-fox", "blue-hen"))


def test_variable_tracking_written_out(tokenizer):
    sample = task("ruler-vt").sample(tokenizer, 600, 0, 0)
    text = text_of(tokenizer, sample)
    asked = text[text.rindex("Remember and follow") :]
    lines = [line for line in asked.split("\n") if line.startswith("VAR")]
    names = sample.answers
    value = lines[0].split(" = ")[1]
    assert len(names) == 5 and all(len(name) == 5 and name.isupper() for name in names)
    assert lines == [f"VAR {a} = {b}" for a, b in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False)]
    assert text.endswith(f"Answer: The 5 variables that are assigned the value {value} in the text above are:")


def test_common_words_are_the_common_ones(tokenizer):
    sample = task("ruler-cwe").sample(tokenizer, 4096, 0, 0)
    listed = text_of(tokenizer, sample).split("Remember those.\n")[2].split("\nQuestion")[0]
    words = [part.split(". ")[1] for part in listed.replace(" ", "\n").replace(".\n", ". ").split("\n")]
    counts = {word: words.count(word) for word in words}
    assert len(sample.answers) == 10
    assert {counts[word] for word in sample.answers} == {30}
    assert {count for word, count in counts.items() if word not in sample.answers} == {3}


def test_frequent_words_follow_the_zeta_law(tokenizer):
    assert zeta_counts(1000, 4, 2.0) == [607, 151, 67, 37]  # 1000 · 6/π² = 607.9, then a 4th, a 9th, a 16th
    sample = task("ruler-fwe").sample(tokenizer, 700, 0, 0)
    words = text_of(tokenizer, sample).split("\n")[1].split(" ")
    counts = {word: words.count(word) for word in words}
    ranked = sorted(counts, key=counts.__getitem__, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.answers


def test_questions_come_with_all_their_paragraphs(tokenizer, questions):
    read = RulerQuestions.read(questions)
    (question,) = read.questions  # the one without an answer is left out
    assert question.paragraphs == (0, 2) and question.answers == ("Rome", "in Rome")
    text = text_of(tokenizer, read.sample(tokenizer, 200, 0, 0))
    assert text.endswith("\n\nQuestion: Where? Answer:") and text.count("Document") == 3
    assert all(context in text for context in ("Ann lives in Rome.", "Rome is old.", "Bob has a dog."))
    short = text_of(tokenizer, read.sample(tokenizer, 82, 0, 0))
    assert "Bob" not in short and "Rome is old." in short
    questions.with_name("wrong.json").write_text('{"data": [{}]}')
    with pytest.raises(ValueError, match=r"wrong.json: not in SQuAD's format"):
        RulerQuestions.read(questions.with_name("wrong.json"))


def test_perplexity_windows_are_spread_over_the_text(tokenizer):
    one = task("ppl")
    ids = tokenizer.encode(TEXT)
    assert list(one.sample(tokenizer, 128, 0, 0).tokens) == ids[:128]
    assert list(one.sample(tokenizer, 128, 49, 0).tokens) == ids[-128:]
    with pytest.raises(ValueError, match="too long"):
        one.sample(tokenizer, 10**6, 0, 0)


@pytest.mark.parametrize("length", [400, 1001])
def test_turns_ask_for_facts_before_them(tokenizer, length):
    sample = task("turns").sample(tokenizer, length, 3, 0)
    assert len(sample.tokens) == length and sample.scored[-1] == length - 1 and not sample.max_new_tokens
    text = text_of(tokenizer, sample)
    facts = re.findall(r"The pass key of (\w+) is (\d+)\. Remember it\.", text)
    asked = re.findall(r"Question: What is the pass key of (\w+)\? Answer: The pass key of \1 is (\d+)", text)
    assert len(facts) == 8 and sorted(asked) == sorted(facts) and asked != facts
    answers = tokenizer.decode([sample.tokens[place] for place in sample.scored])
    assert answers.replace(" ", "") == "".join(key for _, key in asked)
    assert text.rindex("Remember") < text.index("Question") and 0.3 < text.index("Question") / len(text) < 0.7
    with pytest.raises(ValueError, match="length 60 is too short"):
        task("turns").sample(tokenizer, 60, 0, 0)


def test_fills_are_exact_and_say_when_there_is_no_room(tokenizer):
    ask = lambda text: tokenizer.encode(f"Start. {text}\n\nEnd now")  # noqa: E731
    assert tokenizer.decode(fill_text(tokenizer, "One two. Three four.", ask, 12)).endswith("\n\nEnd now")
    for length in (9, 30, 100):  # longer than the text: it begins anew
        assert len(fill_text(tokenizer, "One two. Three four. ", ask, length)) == length
    with pytest.raises(ValueError, match="too short"):
        fill_text(tokenizer, "One", ask, 3)
    for length in range(3, 40):
        assert len(fill_pieces(lambda n: [0] * (3 * n), length, least=1, most=20)) == min(length // 3 * 3, 60)
    with pytest.raises(ValueError, match="too short"):
        fill_pieces(lambda n: [0] * 10 * n, 9, least=1, most=20)
    assert insert_between_sentences("A b. C d. E f.", ["X.", "Y."], [0.0, 0.6]) == "X. A b. C d. Y. E f."
    assert words_of("The cat saw Paris; the cats sat.", shortest=3) == ("cat", "cats", "sat", "saw", "the")


def test_unknown_tasks_and_missing_files_are_named():
    assert [one.name for one in make_tasks(["niah", "kv", "kv"], text=TEXT)] == [*GROUPS["niah"], "kv"]
    for names, message in ((["nia"], "no task is named 'nia'"), (["ruler-qa_2"], "SQuAD"), (["longbench"], "JSONL")):
        with pytest.raises(ValueError, match=message):
            make_tasks(names, text=TEXT)
    with pytest.raises(ValueError, match="3 files of questions"):
        make_tasks(["kv"], text=TEXT, qa=["a.json", "b.json", "c.json"])


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_infinitebench_is_read_truncated_in_the_middle_and_scored(tmp_path, tokenizer):
    choice = {
        "context": " ".join(map(str, range(200))),
        "input": "Which?",
        "answer": ["two"],
        "options": ["one", "two"],
    }
    (one,) = make_tasks(["infinitebench"], files=[lines(tmp_path / "longbook_choice_eng.jsonl", choice)])
    assert isinstance(one, JsonlTask) and one.name == "infinitebench-longbook_choice_eng"
    sample = one.sample(tokenizer, 120, 0, 0)
    text = text_of(tokenizer, sample)
    assert len(sample.tokens) <= 120 and sample.answers == ("B",) and "A. one\nB. two" in text
    assert text.startswith("0 1 2") and " 198 199\n\nQuestion: Which?" in text and " 100 " not in text
    assert one.score("The letter is B.", sample.answers) == 1 and one.score("A", sample.answers) == 0
    key = lines(tmp_path / "passkey.jsonl", {"context": "x {input} y", "input": "Key?", "answer": 71432, "options": []})
    task = read_infinitebench(key)
    assert "x {input} y\n\nKey?" in text_of(tokenizer, task.sample(tokenizer, 500, 0, 0))
    assert task.score(" 71432. The", ("71432",)) == 1 and task.score(" 7143", ("71432",)) == 0
    with pytest.raises(ValueError, match="neither content nor name tell a task of InfiniteBench"):
        read_infinitebench(lines(tmp_path / "novel.jsonl", {"context": "x", "input": "Why?", "answer": "so"}))
    with pytest.raises(ValueError, match="line 1: KeyError"):
        read_infinitebench(lines(tmp_path / "kv_retrieval.jsonl", {"context": "x"}))


def test_what_a_file_of_infinitebench_holds_tells_its_task(tmp_path):
    book, code = "It was a dark night. " * 600, "def f(x):\n    return x\n\n" * 9
    contents = {
        "passkey": ("The grass is green.", "What is the pass key?", []),
        "number_string": ("The grass is green.", "What is the sequence of digits?", []),
        "kv_retrieval": ('JSON data:\n{"a": "b"}', 'Key: "a"\nThe value associated with the specified key is: ', []),
        "longdialogue_qa_eng": ("$$MASK$$: Hello.", "Who is $$MASK$$?", []),
        "math_find": ("[1, -2, 3.5]", "The largest number of the list is: ", []),
        "code_debug": (code, "Which function has an error?", ["f", "g"]),
        "longbook_choice_eng": (book, "Who came?", ["Ann", "Bob"]),
        "longbook_sum_eng": (book, "", []),
        "longbook_qa_eng": (book, "Who came?", []),
        "longbook_qa_chn": (book, "谁来了？", []),
    }
    for name, (context, question, options) in contents.items():
        record = {"context": context, "input": question, "answer": options[:1] or "x", "options": options}
        assert read_infinitebench(lines(tmp_path / "any.jsonl", record)).name == f"infinitebench-{name}"


def test_longbench_is_read_and_scored(tmp_path, tokenizer):
    record = {"context": "Ann lives in Rome.", "input": "Where does Ann live?", "answers": ["In Rome", "Rome"]}
    task = read_longbench(lines(tmp_path / "hotpotqa_e.jsonl", record, record))
    sample = task.sample(tokenizer, 500, 1, 0)
    assert (task.name, sample.answers, sample.max_new_tokens) == ("longbench-hotpotqa_e", ("In Rome", "Rome"), 32)
    assert task.score("rome", sample.answers) == 1 and task.score("Paris", sample.answers) == 0
    files = [lines(tmp_path / "hotpotqa.jsonl", record), tmp_path / "hotpotqa_e.jsonl"]
    both = make_tasks(["longbench"], files=files)
    assert [one.name for one in both] == ["longbench-hotpotqa", "longbench-hotpotqa_e"]
    with pytest.raises(ValueError, match="another file is named longbench-hotpotqa too"):
        make_tasks(["longbench"], files=[*files, files[0]])
    named = [record | {"dataset": name} for name in ("qasper", "musique")]
    assert read_longbench(lines(tmp_path / "any.jsonl", named[0])).name == "longbench-qasper"
    with pytest.raises(ValueError, match="several data sets: qasper, musique"):
        read_longbench(lines(tmp_path / "any.jsonl", *named))
    classes = ["Animal", "City", "City of birth"]
    record = {"context": "Examples.", "input": "Type of Rome?", "answers": ["City of birth"], "all_classes": classes}
    task = read_longbench(lines(tmp_path / "trec.jsonl", record))
    answers = task.sample(tokenizer, 500, 0, 0).answers
    assert task.score("City of birth\nAnimal", answers) == 1  # "City" is part of it; what follows is another example
    assert task.score("Animal or City of birth", answers) == 0.5
    assert task.score("City", answers) == task.score("", answers) == 0
    record |= {"all_classes": None, "answers": ["Ann Lee"]}
    for name in ("triviaqa", "samsum"):
        task = read_longbench(lines(tmp_path / f"{name}.jsonl", record))
        assert task.score("\nAnn Lee\nPassage: Rome is old.", ("Ann Lee",)) == 1


def test_metrics_on_hand_made_replies():
    assert all_found("It is 12 and thirty.", ("12", "THIRTY", "7")) == pytest.approx(2 / 3)
    assert any_found("it is thirty", ("7", "Thirty")) == 1
    assert starts_with(" 12 Elm. And so", ("12 elm",)) == 1 and starts_with("so 12", ("12",)) == 0
    assert starts_with("66666", ("666",)) == 0  # a longer number is another number
    assert first_number("about 41 or 42", ("42",)) == 0 and first_number("3.5", ("3.5",)) == 1
    assert first_number("it is 12", ("12.0",)) == first_number("3.50", ("3.5",)) == 1
    assert first_number("12", ("012",)) == first_number("1.5", ("one",)) == 0
    assert first_letter("As for D, no", ("D",)) == 1 and first_letter("Doubt", ("D",)) == 0
    assert token_f1("The cat, sat down", ("a cat sat",)) == pytest.approx(0.8)  # 2 common of 3 and 2
    assert token_f1("北京大学", ("北京",)) == pytest.approx(2 / 3)  # 2 common of 4 and 2
    assert rouge_l("a b c d", ("a c d e f",)) == pytest.approx(2 * 3 / 9)
    assert code_similarity("# note\nz = 0  // no\nx = 1\ny = 2", ("x = 1",)) == 1
    assert share_of_numbers("paragraph 3 or 4", ("Paragraph 4",)) == 0.5


def test_wilson_intervals():
    # 48 of 50: the textbook interval.
    low, high = wilson(0.96, 50)
    assert (round(low, 4), round(high, 4)) == (0.8654, 0.9890)
    assert wilson(1.0, 50)[1] == 1.0 and wilson(1.0, 50)[0] == pytest.approx(0.9287, abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)
