"""Which of the Latin code pages some bytes were written in: that whose letters are those of one language.

Nearly every byte is a letter in each of these pages, so that statistics of few words tell them apart badly: a Polish ł
is ³ in the Western page, and a Portuguese ã is ă in the Central European one.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of readings that suit equally well the first is taken.
PAGES = ("cp1252", "cp1250", "cp1254", "iso8859_2", "cp1257", "mac_roman")
# The letters beside a to z, by language; the first language that suits best is taken, and few people write Icelandic.
ALPHABETS = {
    "German": "äöüß", "French": "àâæçèéêëîïôœùûüÿ", "Spanish": "áéíñóúü", "Portuguese": "àáâãçéêíóôõúü",
    "Italian": "àèéìíîòóùú", "Danish, Norwegian": "æøåéèêòôü",
    "Swedish, Finnish": "åäöé", "Dutch": "áéèêëíïóöúü", "Polish": "ąćęłńóśźż",
    "Turkish": "çğıİöşüâîû",
    "Czech": "áčďéěíňóřšťúůýž", "Slovak": "áäčďéíĺľňóôŕšťúýž", "Hungarian": "áéíóöőúüű", "Romanian": "ăâîşţșț",
    "Croatian, Slovene, Bosnian": "čćđšž", "Lithuanian": "ąčęėįšųūž", "Latvian": "āčēģīķļņšūž",
    "Estonian": "äõöüšž", "Icelandic": "áæðéíóöúýþ",
}  # fmt: skip
SIGNS = "€£§°–—‘’“”„«»…ºª¿¡"  # of no language; those for powers would stand in a Polish word
SUITS_MIN = 0.95


def find_page(words: Sequence[bytes]) -> str | None:
    """The code page in which nearly all signs beyond ASCII are letters of one language; None: none suits.

    >>> find_page(["Łódź".encode("cp1250"), "Gdańsk".encode("cp1250")])
    'cp1250'
    >>> find_page(["São".encode("cp1252"), "Conceição".encode("cp1252")])
    'cp1252'
    >>> find_page(["Москва".encode("cp1251")]) is None
    True
    """
    suiting = {page: max(_list_shares(b" ".join(words), page)) for page in PAGES}
    page = max(PAGES, key=lambda one: suiting[one])
    return page if suiting[page][0] >= SUITS_MIN else None


def _list_shares(text: bytes, page: str) -> list[tuple[float, int]]:
    """For each language the share of the signs that are its letters, and how early it stands in the table."""
    try:
        read = text.decode(page)
    except UnicodeDecodeError:
        return [(0.0, 0)]
    signs = [
        # a capital inside a word is a wrong reading
        "" if sign.isupper() and (before.islower() or (before.isalpha() and after.islower())) else sign
        for before, sign, after in zip(f" {read}", read, f"{read[1:]} ", strict=False)
        if not sign.isascii()
    ]
    known = [{*letters, *letters.upper(), *SIGNS} for letters in ALPHABETS.values()]
    return [(sum(sign in one for sign in signs) / max(len(signs), 1), -place) for place, one in enumerate(known)]
