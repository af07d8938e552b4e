"""The rules that our reader of predict.py and train.py holds, and the error it raises.

Cog reads these files without running them. Where it cannot follow the source it often says
nothing: a default becomes "required", a bound or a description disappears. Each rule below names
what Cog would do (`why`) and what to write instead (`remedy`). The reader is stricter than Cog:
what this project has no use for is refused too, so that nothing is left to luck.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One thing the source must not do."""

    why: str
    remedy: str


RULES: dict[str, Rule] = {
    # The file and the target
    "syntax": Rule("the file is not valid Python", "fix the syntax error"),
    "target-missing": Rule(
        "Cog looks for the target only among the definitions at the top of that very file",
        "define it there, not inside `if` or `try`, and do not import it",
    ),
    "target-kind": Rule(
        "the prediction target must be a class and the training target a function;"
        " the server refuses a training class",
        "name a class under `predict:` and a function under `train:` in cog.yaml",
    ),
    "target-base": Rule(
        "methods inherited from another class are read by Cog but not by this reader",
        "inherit from exactly one class, BasePredictor or BaseRunner, imported from cog",
    ),
    "target-twice": Rule(
        "Cog's parser and Python may choose different definitions of the same name",
        "keep one definition",
    ),
    "run-and-predict": Rule(
        "Cog's parser takes run(), and its server refuses to load a class with both",
        "keep either run() or predict()",
    ),
    "method-missing": Rule(
        "the class has no run() or predict() defined directly in its body",
        "define `def predict(self, ...)` in the class body",
    ),
    "self": Rule(
        "Cog skips the first parameter only when it is a plain, unannotated `self`",
        "write `self` first, without annotation or default",
    ),
    "parameter-kind": Rule(
        "Cog's parser ignores *args, **kwargs, `*` and `/`, and its server cannot fill them",
        "declare every input as an ordinary named parameter",
    ),
    "streaming-output": Rule(
        "@streaming needs an iterator output", "return Iterator[...] or remove @streaming"
    ),
    # Annotations
    "annotation-missing": Rule(
        "Cog refuses an input without a type", "annotate it, for instance `steps: int`"
    ),
    "annotation-unsupported": Rule(
        "inputs here are str, int, float, bool, Path, Secret, list[X], Optional[X] or X | None",
        "use one of these; spell a fixed set of values with `choices=`, not Literal or Enum",
    ),
    "annotation-form": Rule(
        "Cog matches annotations by their text",
        "write the bare name: not quoted, not in parentheses, not `module.Name`",
    ),
    "name-origin": Rule(
        "Cog matches the name and not the object behind it; pathlib.Path builds,"
        " but the server then hands over the URL as a plain str",
        "import the name itself at the top of the file: Path, Secret and Input from cog,"
        " Optional and List from typing",
    ),
    # Input(...)
    "input-missing": Rule(
        "without Input(...) an input has no description, and a missing value fails at run time",
        'write `= Input(description="...")`, with `default=` unless it is required',
    ),
    "input-not-in-place": Rule(
        "Cog does not follow helpers, shared Input objects or values other than Input(...)",
        "call Input(...) in the signature itself",
    ),
    "input-positional": Rule(
        "Cog never reads a positional default: the input silently becomes required",
        "write `default=`",
    ),
    "input-keyword": Rule(
        "Cog's parser ignores keywords it does not know, drops `**`, and refuses default_factory",
        "use default, description, ge, le, min_length, max_length, regex, choices, deprecated"
        " or accept",
    ),
    "description-missing": Rule(
        "an input without description cannot be understood by its users",
        'add `description="..."`',
    ),
    "description-form": Rule(
        "Cog silently drops a description that is not one string literal",
        "write one plain string literal, or the name of a string constant of the same file",
    ),
    "default-not-literal": Rule(
        "Cog cannot evaluate it: the default silently becomes null and the input required",
        "write a literal, or the name of a literal constant bound in the same file",
    ),
    "default-none": Rule(
        "None on an input that is not Optional silently makes it required",
        "annotate it `Optional[...]`, or give a real default",
    ),
    "default-absent": Rule(
        "an Optional input without default fails at run time when it is left out",
        "write `default=None`",
    ),
    "default-type": Rule(
        "nothing checks that the default has the input's own type",
        "give a default of the annotated type; Path and Secret inputs may only default to None",
    ),
    "default-outside": Rule(
        "nothing checks the default against choices, bounds, length or pattern",
        "choose a default that the input itself would accept",
    ),
    "choices-not-literal": Rule(
        "Cog drops or refuses choices that are not literals; a dict of classes loses its keys",
        "write a list literal, the name of a list of literals bound in the same file,"
        " or a `+` of those",
    ),
    "choices-values": Rule(
        "choices must be two or more different values of the input's own type, str or int,"
        " on an input that is not a list and has no other bound",
        "correct the list or the annotation",
    ),
    "constraint-not-literal": Rule(
        "Cog silently drops a constraint that is not a plain literal",
        "write the number, string or bool itself",
    ),
    "constraint-type": Rule(
        "the constraint means nothing for this type",
        "ge and le belong to int and float; min_length, max_length and regex to str;"
        " accept to Path; none of them to a list",
    ),
    "constraint-order": Rule(
        "no value can satisfy the constraint", "let the lower bound not exceed the upper one"
    ),
    # Literals
    "parenthesised": Rule(
        "Cog does not look inside parentheses: the value is refused or silently dropped",
        "remove the parentheses",
    ),
    "comment-inside": Rule(
        "Cog takes a comment or a line continuation inside the value for one of its elements",
        "move the comment above or behind the value",
    ),
    "string-form": Rule(
        "Cog copies the text between the quotes: escapes stay raw, joined strings keep their"
        " quotes, other prefixes are dropped",
        'write one string without backslash, f, b or u prefix; r"..." for a regular expression',
    ),
    "number-form": Rule(
        "Cog reads plain decimal numbers of 64 bits (bounds: 53 bits) and drops all others",
        "write it in decimal, without a space after the minus",
    ),
    "name-rebound": Rule(
        "Cog sees only the literal, not a later change of the name",
        "bind the name once at the top of the file and do not change it",
    ),
    # Outputs
    "return-missing": Rule("Cog refuses a target without return type", "annotate the return type"),
    "return-unsupported": Rule(
        "outputs here are str, int, float, bool, Path, list[X], Iterator[X],"
        " ConcatenateIterator[str] or a BaseModel of the same file",
        "return one of these",
    ),
    # The whole document
    "shared-choices": Rule(
        "the two lists share one component named after the input, and training is then validated"
        " against the prediction's list",
        "rename one input, or make the lists identical",
    ),
    "component-clash": Rule(
        "the enumeration would take the name of one of Cog's own components",
        "rename the input",
    ),
}


class SchemaError(Exception):
    """The source says something that Cog would refuse, drop or alter."""

    def __init__(self, path: str, line: int, source: str, rule: str, problem: str) -> None:
        self.path = path
        self.line = line
        self.source = source
        self.rule = rule
        self.problem = problem
        super().__init__(
            f"{path}:{line}: {problem} [{rule}]\n"
            f"    {source}\n"
            f"  why: {RULES[rule].why}\n"
            f"  remedy: {RULES[rule].remedy}"
        )
