"""What a tokenizer can read."""


def whole_characters(text: str) -> tuple[str, tuple[str, ...]]:
    """The text without halves of characters, and a notice if there were any.

    A program that cuts an emoji in two, as JavaScript's substring does, leaves half of a pair (a surrogate of UTF-16),
    which JSON carries and no tokenizer takes. Two halves side by side are the character.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole.count("\ufffd") == text.count("\ufffd"):
        return whole, ()
    return whole, ("half of a character, as of an emoji that was cut in two, is not read",)
