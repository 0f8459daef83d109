"""Mutants: a right answer with one thing changed, as a slip of the hand would."""

import ast
import inspect
import linecache
import textwrap
from collections import Counter

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.MatMult: ast.Mult}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def mutants(function):
    """Yield (description, mutated function) for every place of the function's source and every slip that fits there."""
    function = getattr(function, "fn", function)  # what a kernel wraps
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    tree.body[0].decorator_list = [d for d in tree.body[0].decorator_list if not _registers(d)]
    tree.body[0].body = [node for node in tree.body[0].body if not _is_docstring(node)]
    plain, seen = ast.unparse(tree), Counter()
    for index, node in enumerate(ast.walk(ast.parse(plain))):
        for number in range(len(list(_slips(node)))):
            changed = ast.parse(plain)
            target = list(ast.walk(changed))[index]
            before = ast.unparse(target)
            replacement = list(_slips(target))[number]
            changed = ast.fix_missing_locations(_Replace(target, replacement).visit(changed))
            text = ast.unparse(changed)
            if text != plain:
                description = f"{before} -> {ast.unparse(replacement)}"
                seen[description] += 1
                again = f", place {seen[description]}" if seen[description] > 1 else ""
                yield description + again, _compiled(text, function)


def _slips(node):
    """Replacements of one node: swapped operands, another operator, a term dropped, a constant, an index, an axis."""
    if isinstance(node, ast.BinOp):
        left, right, op = node.left, node.right, node.op
        if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        if isinstance(op, ast.Sub | ast.Div | ast.MatMult):
            yield ast.BinOp(right, op, left)
        yield left
        yield right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and isinstance(node.ctx, ast.Load):
        for op in (ast.Add(), ast.Sub()):
            yield ast.Subscript(node.value, ast.BinOp(node.slice, op, ast.Constant(1)), node.ctx)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and not node.keywords:
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT") and isinstance(node.ctx, ast.Load):
        yield node.value
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)
        yield ast.Assign([node.target], node.value)


class _Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def _compiled(text, function):
    """The function that the text defines, with its source where inspect and Triton look for it."""
    name = f"<mutant of {function.__name__} {hash(text)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = dict(function.__globals__)
    exec(compile(text, name, "exec"), names)
    return names[function.__name__]


def _registers(decorator):
    """True for @answers.right(...) and @answers.wrong(...), which a mutant must not repeat."""
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith("answers.")


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
