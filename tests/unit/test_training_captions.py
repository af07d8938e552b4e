"""Captions of photos: found by name in tables and texts, or refused; the trigger word is there."""

import codecs

import pytest

from preprocess.archive import unpacked
from preprocess.captions import check_trigger_word, read_captions
from preprocess.errors import BadCaptions
from tests.helpers.archives import zip_bytes
from tests.helpers.photos import LABEL, photos
from weights.trigger_words import has_trigger_word, replace_trigger_words

TABLE = "caption,image_file\na TOK,a.jpg\na red TOK,b.jpg\n"
BOTH = {"a.jpg": "a TOK", "b.jpg": "a red TOK"}
AB = ("a.jpg", "b.jpg")


@pytest.fixture
def captions_in(tmp_path):
    """The captions of photos of these names, with these texts beside them."""

    def read(names, texts):
        path = tmp_path / "sent"
        encoded = {n: t.encode() if isinstance(t, str) else t for n, t in texts.items()}
        path.write_bytes(zip_bytes(photos(*names) | encoded))
        folder = tmp_path / "unpacked"
        folder.mkdir()
        try:
            with unpacked(path, LABEL, folder) as found:
                return read_captions(found)
        finally:
            assert list(folder.iterdir()) == []
            folder.rmdir()

    return read


# --- tables


@pytest.mark.parametrize(
    "name", ["caption.csv", "captions.csv", "CAPTION.CSV", "x/Captions.csv", "metadata.csv"]
)
def test_a_table_of_any_name(captions_in, name):
    assert captions_in(AB, {name: TABLE}) == BOTH


FORMS = {
    "no final line end": TABLE.rstrip(),
    "Windows line ends": TABLE.replace("\n", "\r\n"),
    "old Mac line ends": TABLE.replace("\n", "\r"),
    "a mark": codecs.BOM_UTF8 + TABLE.encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "quotes": 'caption,image_file\n"a TOK","a.jpg"\n"a red TOK","b.jpg"',
    "semicolons": TABLE.replace(",", ";"),
    "tabs": TABLE.replace(",", "\t"),
    "other order": "image_file,caption\nb.jpg,a red TOK\na.jpg,a TOK\n",
    "more columns": "width,image_file,caption,\n9,b.jpg,a red TOK,\n9,a.jpg,a TOK,\n",
    "Hugging Face": "file_name,text\nb.jpg,a red TOK\na.jpg,a TOK\n",
    "both kinds": "file_name,text,caption\nb.jpg,x,a red TOK\na.jpg,x,a TOK\n",
    "capitals, spaces": " Caption , Image_File \n a TOK , a.jpg \n a  red\tTOK ,b.jpg",
    "empty lines": TABLE.replace("\n", "\n\n") + ",\n",
    "lines in quotes": TABLE.replace("a red TOK", '"a red\nTOK"'),
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_a_table_of_any_form(captions_in, content):
    assert captions_in(AB, {"caption.csv": content}) == BOTH


def test_quotes_and_signs_in_captions(captions_in):
    table = 'caption,image_file\n"a ""TOK"", big",a.jpg\na 3" TOK – “新” 🎈\u2028x,b.jpg\n'
    assert captions_in(AB, {"caption.csv": table}) == {
        "a.jpg": 'a "TOK", big',
        "b.jpg": 'a 3" TOK – “新” 🎈 x',
    }


WAYS = {
    # how a photo is written: (the photo, another one, the table)
    "as it is": ("x/1.jpg", "2.jpg", "c.csv", "x/1.jpg"),
    "no folder": ("x/1.jpg", "2.jpg", "c.csv", "1.jpg"),
    "no ending": ("x/1.jpg", "2.jpg", "c.csv", "x/1"),
    "neither": ("x/1.jpg", "2.jpg", "c.csv", "1"),
    "beside the table": ("x/1.jpg", "1.jpg", "x/c.csv", "1.jpg"),
    "from the top": ("x/1.jpg", "1.jpg", "x/c.csv", "x/1.jpg"),
    "at the top": ("1.jpg", "x/1.jpg", "c.csv", "1.jpg"),
    "another case": ("IMG_1.JPG", "2.jpg", "c.csv", "img_1.jpg"),
    "the same case first": ("a.jpg", "A.jpg", "c.csv", "a.jpg"),
    "the same ending first": ("1.jpg", "1.jpg.png", "c.csv", "1.jpg"),
    "backslashes": ("x/1.jpg", "1.jpg", "c.csv", "x\\1.jpg"),
    "from somebody's disk": ("x/1.jpg", "2.jpg", "c.csv", "C:\\Users\\me\\1.jpg"),
    "from a disk to the top": ("1.jpg", "x/2.jpg", "c.csv", "/home/me/1.jpg"),
    "half of the path": ("me/x/1.jpg", "me/y/1.jpg", "c.csv", "x/1.jpg"),
    "this folder": ("1.jpg", "x/1.jpg", "c.csv", "./1.jpg"),
    "dots": ("a.b.c.jpg", "a.jpg", "c.csv", "a.b.c"),
    "spaces": ("my photo (1).jpg", "my photo.jpg", "c.csv", " my photo (1).jpg "),
    "decomposed": ("\u00fc.jpg", "u.jpg", "c.csv", "u\u0308.jpg"),
}


@pytest.mark.parametrize(("name", "other", "table", "written"), WAYS.values(), ids=WAYS)
def test_a_photo_is_found_however_it_is_written(captions_in, name, other, table, written):
    found = captions_in((name, other), {table: f"image_file,caption\n{written},a TOK"})
    assert found == {name: "a TOK", other: None}


# --- texts


def test_texts_beside_photos(captions_in):
    names = ("a.jpg", "B.PNG", "x/a.jpg", "x/c.jpeg")
    texts = {
        "a.txt": codecs.BOM_UTF8 + b" a TOK\r\n\r\nhere\r\n",
        "b.txt": "a TOK there".encode("utf-16"),
        "x/a.txt": "another TOK",
        "x/c.jpeg.TXT": "a third",
        "README.txt": "made by me",
    }
    assert captions_in(names, texts) == {
        "a.jpg": "a TOK here",
        "B.PNG": "a TOK there",
        "x/a.jpg": "another TOK",
        "x/c.jpeg": "a third",
    }


def test_the_table_counts_before_texts(captions_in):
    texts = {
        "c.csv": "image_file,caption\na,table\nc,",
        "a.txt": "text",
        "b.txt": "b",
        "c.txt": "c",
    }
    assert captions_in(("a.jpg", "b.jpg", "c.jpg"), texts) == {
        "a.jpg": "table",
        "b.jpg": "b",
        "c.jpg": "c",
    }


# --- photos without a caption


def test_photos_without_captions_get_automatic_ones(captions_in, capsys):
    assert captions_in(AB, {}) == {"a.jpg": None, "b.jpg": None}
    assert capsys.readouterr().out == ""
    texts = {"a.txt": "a TOK", "b.txt": " \n"}
    assert captions_in((*AB, "c.jpg"), texts) == {"a.jpg": "a TOK", "b.jpg": None, "c.jpg": None}
    assert capsys.readouterr().out == (
        "input_images: 2 of 3 images have no caption, 'b.jpg', 'c.jpg': captioned automatically\n"
    )


# --- what is refused

BAD = {
    # name: (texts, what the message has to say, and its remedy)
    "two tables": (
        {"caption.csv": TABLE, "x/captions.csv": TABLE},
        "holds 2 .csv files, 'caption.csv' and 'x/captions.csv'", "send one table",
    ),
    "empty table": ({"c.csv": ""}, "needs one column image_file, and has none", "begin it with"),
    "no header": (
        {"c.csv": "a TOK,a.jpg\na TOK,b.jpg"},
        "needs one column image_file, and has 'a tok', 'a.jpg'", '"caption,image_file"',
    ),
    "no captions": ({"c.csv": "image_file,x\na.jpg,1"}, "needs one column caption", "begin it"),
    "no pictures": ({"c.csv": "caption,x\na TOK,1"}, "needs one column image_file", "begin it"),
    "a column twice": (
        {"c.csv": "caption,caption,image_file\n1,2,a.jpg"}, "needs one column caption", "begin it",
    ),
    "only a header": ({"c.csv": "caption,image_file\n"}, "has no rows", "one for each image"),
    "unknown picture": (
        {"c.csv": TABLE + "a TOK,monster (6).jpg"},
        "'c.csv', line 4 has a caption for 'monster (6).jpg', and there is no such", "correct",
    ),
    "another ending": ({"c.csv": "caption,image_file\nx,a.png"}, "for 'a.png', and", "correct"),
    "no picture named": ({"c.csv": TABLE + "a TOK,"}, "line 4 names no image", "write its"),
    "commas": (
        {"c.csv": "image_file,caption\na.jpg,a TOK, red\n"},
        "line 2 has 3 cells, and the first line 2", "into quotes",
    ),
    "two rows": ({"c.csv": TABLE + "x,a.jpg"}, "a second caption for 'a.jpg'", "leave one"),
    "unknown in its folder": (
        {"c.csv": "caption,image_file\nx,y/a.jpg"}, "for 'y/a.jpg', and there is no", "correct",
    ),
    "two rows, one folder": (
        {"c.csv": TABLE + "x,z/a.jpg"}, "line 4 has a second caption for 'a.jpg'", "leave one",
    ),
    "ambiguous": (
        {"c.csv": "caption,image_file\nx,1.jpg"},
        "for '1.jpg', which may mean 'x/1.jpg' or 'y/1.jpg'", "write the folder",
    ),
    "ambiguous ending": (
        {"c.csv": "caption,image_file\nx,2"}, "which may mean '2.jpg' or '2.png'", "the ending too",
    ),
    "ambiguous case": (
        {"c.csv": "caption,image_file\nx,R.JPG"}, "may mean 'R.jpg' or 'r.jpg'", "the folder",
    ),
    "open quotes": ({"c.csv": TABLE + '"a TOK,b'}, "is no valid table: unexpected end", "save it"),
    "text behind quotes": (
        {"c.csv": 'caption,image_file\n"a" TOK,a.jpg\n'}, "is no valid table", "save it as CSV",
    ),
    "endless cell": (
        {"c.csv": "caption,image_file\n" + "x" * 200_000}, "field larger than field limit", "save",
    ),
    "Latin 1": ({"c.csv": TABLE.encode() + b"caf\xe9,c.jpg"}, "is not UTF-8 text", "save it as U"),
    "a workbook": ({"c.csv": b"PK\3\4\0\0\0\0\0\0"}, "is not text", "save it as UTF-8"),
    "10,000 characters": (
        {"c.csv": TABLE.replace("red", "r" * 10_000)},
        "line 3 has a caption of 10006 characters; at most 2000", "shorten it",
    ),
    "long text": ({"a.txt": "x " * 5000}, "'a.txt' has a caption of 9999 characters", "shorten"),
    "text of another picture": ({"d.txt": "x"}, "'d.txt' has a caption for 'd'", "leave it out"),
    "text elsewhere": ({"x/a.txt": "x"}, "'x/a.txt' has a caption for 'a'", "correct the name"),
    "text of two": ({"2.txt": "x"}, "which may mean '2.jpg' or '2.png'", "write the folder"),
    "two texts of one": (
        {"a.txt": "x", "a.jpg.txt": "y"}, "'a.txt' is a second caption for 'a.jpg'", "leave one",
    ),
    "text in Latin 1": ({"a.txt": b"caf\xe9"}, "'a.txt' is not UTF-8 text (byte 3)", "save it"),
    "a picture named txt": ({"a.txt": photos("a")["a"]}, "'a.txt' is not UTF-8 text", "save it"),
    "half of UTF-16": ({"a.txt": b"\xff\xfea"}, "'a.txt' is not UTF-8 text", "save it"),
}  # fmt: skip
NAMES = ("a.jpg", "b.jpg", "x/1.jpg", "y/1.jpg", "2.jpg", "2.png", "r.jpg", "R.jpg")


@pytest.mark.parametrize(("texts", "fault", "remedy"), BAD.values(), ids=BAD)
def test_bad_captions_are_refused_and_named(captions_in, tmp_path, texts, fault, remedy):
    with pytest.raises(BadCaptions) as caught:
        captions_in(NAMES, texts)
    message = str(caught.value)
    assert message.startswith(LABEL)
    assert fault in message
    assert remedy in message.partition(fault)[2], message
    assert "\n" not in message
    assert str(tmp_path) not in message


# --- the trigger word


def check(*captions, word="TOK", prefix="a photo of TOK, "):
    check_trigger_word({str(k): caption for k, caption in enumerate(captions)}, word, prefix)


TRIGGERS = {
    # name: (captions, word, prefix, what the message has to say, and its remedy)
    "in no caption": (
        ("a toy", "a red toy"), "TOK", "TOK",
        "none of the 2 captions holds the trigger word 'TOK'", '"a photo of TOK", or set token_str',
    ),
    "in lower case": (("a tok",), "TOK", "TOK", "none of the 1 captions", "in the same case as"),
    "in other words": (("TOKYO TOKs",), "TOK", "TOK", "none of the 1", "a word of its own"),
    "not in the prefix": (
        (None, "a TOK"), "TOK", "a photo of a toy, ",
        "caption_prefix 'a photo of a toy, ' lacks the trigger word 'TOK', which 1 auto", "write",
    ),
    "the default prefix": ((None,), "MONSTER", "a photo of TOK, ", "lacks the trigger", "write it"),
    "no prefix": ((None,), "TOK", "", "caption_prefix '' lacks the trigger word 'TOK'", "write it"),
    "lower prefix": ((None,), "TOK", "a photo of tok", "lacks the", "in the same case as"),
    "no word": (("a",), "", "", "token_string '' is no word to type", "choose 1 to 100"),
    "blank": (("a",), " ", " ", "token_string ' ' is no word", "choose 1 to 100"),
    "spaces": (("a TOK",), "TOK ", "TOK ", "'TOK ' is no word to type", "without spaces around"),
    "two lines": (("a",), "T\nK", "", "is no word to type", "printable"),
    "too long": (("a",), "T" * 101, "", "is no word to type", "choose 1 to 100"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("captions", "word", "prefix", "fault", "remedy"), TRIGGERS.values(), ids=TRIGGERS
)
def test_a_trigger_word_that_nothing_teaches(captions, word, prefix, fault, remedy):
    with pytest.raises(BadCaptions) as caught:
        check(*captions, word=word, prefix=prefix)
    assert fault in str(caught.value)
    assert remedy in str(caught.value).partition(fault)[2], str(caught.value)


def test_a_trigger_word_that_is_taught(capsys):
    check("a TOK", "TOK's hat", "(TOK)", prefix="")
    check(None, None)
    check(None, "a TOK")
    check("a cat-like thing", word="cat-like", prefix="")
    check("<toy>", word="<toy>", prefix="")
    check("eine süße Katze", word="süße Katze")
    assert capsys.readouterr().out == ""
    check("a TOK", "a toy", "a toy")
    assert capsys.readouterr().out == "2 of 3 captions lack 'TOK': as meant?\n"


def test_words_are_whole_here_and_when_replaced():
    words = {"TOK": "<s0><s1>"}
    for text in ("TOK", "a TOK.", "TOK, TOK", "TOK's", "-TOK-", "(TOK:1.2)", "TOK ×"):
        assert has_trigger_word(text, "TOK")
        assert "<s0><s1>" in replace_trigger_words(text, words)
    for text in ("tok", "TOKEN", "Tok", "TOK_2", "TOK2", "xTOK", "TOKé", ""):
        assert not has_trigger_word(text, "TOK")
        assert replace_trigger_words(text, words) == text
