"""A process of its own: whether a grammar, on standard input, can be prepared. Its error, if any, on standard output.

Some schemas take llguidance for ever (thirty patterns that must all match: each doubles the time), and a thread cannot
be stopped. Nothing of halfbyte is imported here, so that it starts in a twentieth of a second.
"""

import json
import sys

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import llguidance

MOST_MEMORY = 1 << 30


class _Bytes:
    """A vocabulary of bytes: what a grammar costs to prepare does not depend on the tokens."""

    eos_token_id, bos_token_id, unk_token_id = 256, None, None
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    asked = json.load(sys.stdin)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    limits = llguidance.LLParserLimits(**asked["limits"])
    matcher = llguidance.LLMatcher(tokenizer, asked["grammar"], log_level=0, limits=limits)
    matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
