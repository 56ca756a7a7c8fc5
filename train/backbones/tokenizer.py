"""A tokenizer built in code, for small models that learn in minutes: their words are one token each."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Words that are one token each, so that a small model need not spell; any other text falls back to bytes.
WORDS = (
    "a an the one two three four five of on in to from and then with at off into onto against over under its it "
    "is by up down left right red green blue yellow white black orange purple gray pink brown small large big "
    "heavy light fast slow slowly quickly soft hard ball balls cube box block disk ring pendulum ramp floor wall "
    "table ground water glass rope spring stack tower object objects scene falls fall drops drop rolls roll "
    "slides slide bounces bounce hits hit collides collide swings swing tips topples pushes pushed thrown flies "
    "spins rises rests moves moving stops gravity above again back behind bob bouncing bumps collision comes cyan dark "
    "disappears friction like magenta oncoming out panel passes plain released rest resting rod rolling slope slows "
    "someone starts that tosses"
)


def build_tokenizer(words: str = "", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for any text: <pad> is 0, </s> is 1 and appended, and each of WORDS, and of `words`,
    is one token. chat_template: how it writes a conversation.

    The merges spell the words letter by letter from the left, so every prefix of a word is a token too.
    """
    vocabulary = {"<pad>": 0, "</s>": 1}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges = []
    for word in f"{WORDS} {words}".split():
        prefix = "\u0120"  # how the byte level writes the space before a word
        for letter in word:
            if prefix + letter not in vocabulary:
                vocabulary[prefix + letter] = len(vocabulary)
                merges.append((prefix, letter))
            prefix += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="right", model_max_length=512
    )
    built.chat_template = chat_template
    return built
