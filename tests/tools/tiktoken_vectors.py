"""Make the small tiktoken.model of perigee-text's tests, and what the `tiktoken` package makes of texts with it.

    tests/tools/tiktoken_vectors.py DIR      writes DIR/{tiktoken.model,tokenizer_config.json,vectors.json}

The committed ones are in crates/perigee-text/tests/tiktoken; tests/python/test_tiktoken.py makes them anew and compares.
The vocabulary is trained here on the sentences below, by joining the most frequent pair until there are enough tokens.
"""
import base64
import collections
import json
import pathlib
import random
import sys

import tiktoken

# The pre-tokenisation of the published Kimi checkpoints.
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join([
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])

RANKS = 800
SPECIAL = {
    0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True), 5: ("<|im_system|>", True), 6: ("<|im_middle|>", True),
    11: ("<|tool_calls_section_begin|>", False), 12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False), 14: ("<|tool_call_argument_begin|>", False), 15: ("<|tool_call_end|>", False),
}

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say it's 12345 times 67.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "我能吞下玻璃而不伤身体。中文字符，数字１２３和English混排。",
    "いろはにほへと ちりぬるを。カタカナも漢字も。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "נוסחה עם ניקוד: שָׁלוֹם עוֹלָם.",
    "أَبْجَدِيَّة عربية مع أرقام ٠١٢٣.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों का नाश।",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Tiếng Việt có nhiều dấu: ắ ằ ẳ ẵ ặ.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 and e\u0301 combined, \u1d54b\u212a math 𝔘𝔫𝔦",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x != None}\n\n\n\t# end  \r\n",
    "https://example.org/path?query=1&x=%20#fragment  <|im_end|> [BOS] <|not special|>",
]
EXTRA = ["", " ", "  ", "\n", " \n ", "a  b", "   x", "x   ", "\u00a0\u2003y", "\u3000", "'S", "I'ſ", "DON'T'll",
         "\u0000\u007f\ufffd\ufdd0", "ǅungla", "１２３４", "Ⅷ½", "\r\n\r\n", "a\u0308\u0308", "漢字kanji漢", "ー々〆"]


def train():
    """Tokens by rank: 256 bytes, then the most frequent pairs (the smallest of equally frequent ones)."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = collections.Counter()
    for sentence in SENTENCES:
        for word in sentence.replace(" ", " \0").replace("\0", "").split(" "):
            words[tuple(bytes([byte]) for byte in (" " + word).encode())] += 1
    while len(tokens) < RANKS:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        joinable = {pair: count for pair, count in pairs.items() if pair[0] + pair[1] not in tokens}
        left, right = min(joinable, key=lambda pair: (-joinable[pair], pair))
        tokens.append(left + right)
        joined = collections.Counter()
        for word, count in words.items():
            parts, at = [], 0
            while at < len(word):
                if word[at:at + 2] == (left, right):
                    parts.append(left + right)
                    at += 2
                else:
                    parts.append(word[at])
                    at += 1
            joined[tuple(parts)] += count
        words = joined
    return tokens


def texts():
    """The sentences, odd cases, and random mixtures of their characters."""
    yield from SENTENCES
    yield from EXTRA
    draw = random.Random(14)
    characters = sorted(set("".join(SENTENCES + EXTRA)))
    spaces_and_ascii = " \n\t\r'aA1.!é漢"
    for length in range(1, 60):
        yield "".join(draw.choice(characters) for _ in range(length))
        yield "".join(draw.choice(spaces_and_ascii) for _ in range(length))
    yield "a" * 300 + " " * 100 + "b"


def files():
    """Content by name."""
    tokens = train()
    model = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    special = {RANKS + offset: name for offset, (name, _) in SPECIAL.items()}
    config = {"added_tokens_decoder": {str(RANKS + offset): {"content": name, "special": is_special}
                                       for offset, (name, is_special) in SPECIAL.items()}}
    encoding = tiktoken.Encoding(
        name="fixture", pat_str=PATTERN, mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={name: token for token, name in special.items()},
    )
    vectors = []
    for text in texts():
        ids = encoding.encode_ordinary(text)
        vector = {"text": text, "ids": ids}
        parsed = encoding.encode(text, allowed_special="all")
        if parsed != ids:
            vector["parsed"] = parsed
        vectors.append(vector)
    dumped = "[\n" + ",\n".join(json.dumps(vector) for vector in vectors) + "\n]\n"
    return {"tiktoken.model": model, "tokenizer_config.json": json.dumps(config, indent=1) + "\n", "vectors.json": dumped}


if __name__ == "__main__":
    for file, content in files().items():
        (pathlib.Path(sys.argv[1]) / file).write_text(content)
