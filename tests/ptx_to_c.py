"""A kernel's PTX as C: what one thread does, for ptx_machine.c to run with its memory, its barriers and its neighbours.

Only what Triton makes of this library's kernels is known, by the PTX ISA's definitions; anything else is an error.
Approximate instructions (div.full, ex2.approx, sqrt.approx) are as wrong as that allows; .ftz keeps subnormal numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

MACHINE = Path(__file__).parent / "ptx_machine.c"

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
PAIRED = {"add": "+", "sub": "-", "mul": "*"}
JOINED = {"and": "&", "or": "|", "xor": "^"}
ROUNDED = {"rmi": "floor", "rni": "nearbyint", "rpi": "ceil", "rzi": "trunc"}
SPECIAL = {"%tid.x": "tid", "%ntid.x": "m->threads", "%laneid": "(tid & 31)"}
SPECIAL |= {f"%{name}.{axis}": f"m->{name}[{i}]" for name in ("ctaid", "nctaid") for i, axis in enumerate("xyz")}


def width(kind: str) -> int:
    """Bits of a PTX type."""
    if kind == "pred":
        return 8
    if not re.fullmatch(r"[busf]\d+", kind):
        raise ValueError(f"no translation of type {kind}")
    return int(kind[1:])


def unsigned(kind: str) -> str:
    return f"uint{width(kind)}_t"


def integer(kind: str) -> str:
    return f"int{width(kind)}_t" if kind[0] == "s" else unsigned(kind)


def split(text: str) -> list[str]:
    """Operands at the commas that no bracket holds."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def several(operand: str) -> list[str]:
    """The registers of a vector operand, or the one."""
    return split(operand.strip("{} "))


@dataclass
class Instruction:
    line: int
    name: str
    operands: list[str]
    modifiers: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.modifiers = self.name.split(".")[1:]

    @property
    def kind(self) -> str:
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.operands)} (line {self.line})"


def register(name: str) -> str:
    return "R_" + re.sub(r"\W", "_", name[1:])


def bits(operand: str) -> str:
    """An operand's bits, an unsigned whole number."""
    if operand in SPECIAL:
        return SPECIAL[operand]
    if operand.startswith("%"):
        return register(operand)
    if operand == "global_smem":
        return "SHARED"
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
        return f"0x{operand[2:]}ull"
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
        return f"({operand.rstrip('U')}ll)"
    raise ValueError(f"operand {operand}")


def value(kind: str, operand: str) -> str:
    """An operand as a value of a PTX type."""
    if kind in ("f32", "f64"):
        return f"as_{kind}({bits(operand)})"
    return f"({integer(kind)}){bits(operand)}"


def result(kind: str, target: str, expression: str) -> str:
    """`expression`, a value of a PTX type, into a register."""
    of = f"bits_{kind}" if kind in ("f32", "f64") else f"({unsigned(kind)})"
    return f"{register(target)} = {of}({expression});"


def address(operand: str) -> str:
    base, _, offset = operand.strip("[] ").partition("+")
    return f"((uint64_t){bits(base.strip())} + ({offset.strip() or 0}))"


def whole(kind: str) -> str:
    """The unsigned type of the same width: what wraps."""
    return f"u{width(kind)}"


def _memory(i: Instruction) -> str:
    load = i.name.startswith("ld")
    outside, place = i.operands if load else reversed(i.operands)
    space = "shared" if any(part.startswith("shared") for part in i.modifiers) else "global"
    if space not in i.name or {"nc", "volatile"} & set(i.modifiers):
        raise ValueError(f"no translation of {i}")
    size, parts = width(i.kind) // 8, several(outside)
    code = [f"uint64_t at = {address(place)}; uint8_t *p = {space}_at(m, tid, {i.line}, at, {len(parts) * size});"]
    for k, part in enumerate(parts):
        where = f"m, tid, {i.line}, at + {k * size}, {size}"
        if load:
            code.append(f"{unsigned(i.kind)} v{k}; memcpy(&v{k}, p + {k * size}, {size}); {space}_read({where});")
        else:
            code.append(f"{unsigned(i.kind)} v{k} = {bits(part)}; {space}_written({where}, v{k});")
            code.append(f"memcpy(p + {k * size}, &v{k}, {size});")
    if load:  # after all of them: a register may be the address
        code += [f"{register(part)} = v{k};" for k, part in enumerate(parts)]
    return "{ " + " ".join(code) + " }"


def _mov(i: Instruction) -> str:
    target, source = i.operands
    if target.startswith("{"):
        step = width(i.kind) // len(several(target))
        parts = " ".join(
            f"{register(part)} = v >> {k * step};" for k, part in enumerate(several(target)) if part != "_"
        )
        return f"{{ uint64_t v = {bits(source)}; {parts} }}"
    if source.startswith("{"):
        step = width(i.kind) // len(several(source))
        return (
            f"{register(target)} = "
            + " | ".join(
                f"(uint64_t)(uint{step}_t){bits(part)} << {k * step}" for k, part in enumerate(several(source))
            )
            + ";"
        )
    return f"{register(target)} = {bits(source)};"


def _arithmetic(i: Instruction) -> str:
    head, kind = i.name.split(".")[0], i.kind
    target, a, b, *c = i.operands
    if kind in ("u16x2", "s16x2") and head == "add":
        return f"{register(target)} = added_halves({bits(a)}, {bits(b)});"
    if kind == "f32x2":
        halves = [[f"as_f32((uint64_t){bits(operand)} >> {n})" for operand in (a, b, *c)] for n in (0, 32)]
        low, high = (f"fmaf({x}, {y}, {z[0]})" if z else f"{x} {PAIRED[head]} {y}" for x, y, *z in halves)
        return f"{register(target)} = bits_f32({low}) | (uint64_t)bits_f32({high}) << 32;"
    if head == "fma":
        return result(
            kind, target, f"fma{'f' * (kind == 'f32')}({value(kind, a)}, {value(kind, b)}, {value(kind, *c)})"
        )
    sign = {"add": "+", "sub": "-", "mul": "*", "mad": "*", "div": "/", "rem": "%"}[head]
    if kind[0] == "f":
        answer = f"{value(kind, a)} {sign} {value(kind, b)}"
        return result(kind, target, f"off_by({answer}, 2, {bits(b)})" if "full" in i.modifiers else answer)
    if head in ("div", "rem"):  # by zero: whatever it gives, and no trap
        return result(kind, target, f"{value(kind, b)} ? {value(kind, a)} {sign} {value(kind, b)} : -1")
    if "wide" in i.modifiers:
        kind = f"{kind[0]}{2 * width(kind)}"
        product = f"({integer(kind)}){value(i.kind, a)} * {value(i.kind, b)}"
    elif "hi" in i.modifiers:
        product = f"(__int128){value(kind, a)} * {value(kind, b)} >> {width(kind)}"
    else:
        product = f"(uint64_t){value(whole(kind), a)} {sign} {value(whole(kind), b)}"
    return result(whole(kind), target, f"({product})" + (f" + {value(whole(kind), *c)}" if head == "mad" else ""))


def _extreme(i: Instruction) -> str:
    head, (target, *sources) = i.name[:3], i.operands
    first, *others = (value(i.kind, source) for source in sources)
    for other in others:  # one, or from sm_100 on two
        if i.kind[0] == "f":
            first = f"f{head}{'f' * (i.kind == 'f32')}({first}, {other})"
        else:
            first = f"({first} {'<' if head == 'min' else '>'} {other} ? {first} : {other})"
    return result(i.kind, target, first)


def _sign(i: Instruction) -> str:
    target, a = i.operands
    negative = f"-{value(i.kind, a)}"
    return result(
        i.kind,
        target,
        negative if i.name.startswith("neg") else f"{value(i.kind, a)} < 0 ? {negative} : {value(i.kind, a)}",
    )


def _logic(i: Instruction) -> str:
    head, (target, *sources) = i.name.split(".")[0], i.operands
    if head == "not":
        return f"{register(target)} = {'!' if i.kind == 'pred' else '~'}{bits(sources[0])};"
    return f"{register(target)} = {bits(sources[0])} {JOINED[head]} {bits(sources[1])};"


def _shift(i: Instruction) -> str:
    target, a, b = i.operands
    n = f"(uint32_t){bits(b)}"
    if i.name.startswith("shl"):
        return f"{register(target)} = {n} >= {width(i.kind)} ? 0 : (uint64_t){value(i.kind, a)} << {n};"
    return result(
        i.kind,
        target,
        f"(int64_t){value(i.kind, a)} >> ({n} > 63 ? 63 : {n})"
        if i.kind[0] == "s"
        else f"{n} >= {width(i.kind)} ? 0 : {value(i.kind, a)} >> {n}",
    )


def _setp(i: Instruction) -> str:
    comparison, kind, (target, a, b, *c) = i.modifiers[0], i.kind, i.operands
    x, y = value(kind, a), value(kind, b)
    unordered = comparison == "nan" or (len(comparison) == 3 and comparison[2] == "u")
    if comparison in ("nan", "num"):
        answer = "0" if unordered else "1"
    else:
        answer = f"{x} {COMPARISONS[comparison[:2]]} {y}"
    if kind[0] == "f":
        answer = f"(isnan({x}) || isnan({y}) ? {int(unordered)} : {answer})"
    if len(i.modifiers) == 3 and i.modifiers[1] in JOINED:
        answer = f"({answer}) {JOINED[i.modifiers[1]]} {bits(c[0])}"
    return f"{register(target)} = {answer};"


def _cvt(i: Instruction) -> str:
    to, source = i.modifiers[-2:]
    target, *values = i.operands
    if to in ("f16x2", "bf16x2"):
        high, low = (f"to_{to[:-2]}({value('f32', x)})" for x in values)
        return f"{register(target)} = (uint32_t){high} << 16 | {low};"
    if to in ("f16", "bf16"):
        return f"{register(target)} = to_{to}({value(source, values[0])});"
    if source in ("f16", "bf16"):
        return result(to, target, f"from_{source}({bits(values[0])})")
    given = value(source, values[0])
    how = next((ROUNDED[part] for part in i.modifiers if part in ROUNDED), None)
    if how and to[0] != "f":  # what does not fit becomes the nearest that does, and NaN 0
        limit = 2 ** (width(to) - (to[0] == "s"))
        given = f"saturated({how}((double){given}), {-limit if to[0] == 's' else 0}.0, {limit}.0)"
    elif how:
        given = f"{how}({given})"
    return result(to, target, f"({integer(to)}){given}" if to[0] != "f" else given)


def _lanes(i: Instruction) -> str:
    """What the 32 threads of a warp do together."""
    head, mode = i.name.split(".")[0], i.modifiers[1]
    target, *sources = i.operands
    if head == "shfl":
        how, (a, b, c, mask) = f"SHFL_{mode.upper()}", sources
    else:
        (a, mask), b, c = sources, "0", "0"
        how = {"redux.add.s32": "SUM", "vote.ballot.b32": "BALLOT"}[f"{head}.{mode}.{i.kind}"]
    arguments = ", ".join(f"(uint32_t){bits(operand)}" for operand in (a, b, c, mask))
    return f"{register(target)} = together(m, tid, {i.line}, {how}, {arguments});"


def _matrix(i: Instruction) -> str:
    target, *sources = i.operands
    if i.name == "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        code = f"load_matrices(m, tid, {i.line}, {address(sources[0])});"
    elif re.fullmatch(r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32", i.name):
        given = ", ".join(f"(uint32_t){bits(part)}" for source in sources for part in several(source))
        code = f"multiply_matrices(m, tid, {i.line}, (uint32_t[]){{{given}}});"
    else:
        raise ValueError(f"no translation of {i}")
    return code + " ".join(f" {register(part)} = m->lanes[tid].out[{k}];" for k, part in enumerate(several(target)))


def _simple(form: str):
    def code(i: Instruction) -> str:
        target, *sources = i.operands
        return f"{register(target)} = {form.format(*(bits(source) for source in sources), kind=i.kind)};"

    return code


TRANSLATIONS = (
    dict.fromkeys(("ld", "st"), _memory)
    | dict.fromkeys(("add", "sub", "mul", "mad", "fma", "div", "rem"), _arithmetic)
    | dict.fromkeys(("min", "max"), _extreme)
    | dict.fromkeys(("abs", "neg"), _sign)
    | dict.fromkeys(("and", "or", "xor", "not"), _logic)
    | dict.fromkeys(("shl", "shr"), _shift)
    | dict.fromkeys(("shfl", "redux", "vote"), _lanes)
    | dict.fromkeys(("ldmatrix", "mma"), _matrix)
    | {"mov": _mov, "setp": _setp, "cvt": _cvt}
    | {
        "selp": _simple("{2} ? {0} : {1}"),
        "bfe": _simple("field_{kind}({0}, {1}, {2})"),
        "prmt": _simple("permuted({0}, {1}, {2})"),
        "popc": _simple("__builtin_popcount({0})"),
        "ex2": _simple("bits_f32(off_by(exp2f(as_f32({0})), 2, {0}))"),
        "sqrt": _simple("bits_f32(off_by(sqrtf(as_f32({0})), 1, {0}))"),
    }
)


class Translation:
    """name: the kernel's. parameters: the PTX types of its parameters. code: C, machine and all."""

    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", ptx, re.S)
        if entry is None:
            raise ValueError("no kernel in this PTX")
        self.name = entry[1]
        found = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", entry[2])
        self.parameters = [kind for kind, _ in found]
        self._places = {name: place for place, (_, name) in enumerate(found)}
        self._tables: dict[str, list[str]] = {}
        self._declared: list[tuple[str, str]] = []
        body = self._statements(ptx[entry.end() :], ptx[: entry.end()].count("\n") + 1)
        self.code = MACHINE.read_text().replace("/* what a thread does */", "\n".join(self._registers(body) + body))

    def _registers(self, body: list[str]) -> list[str]:
        used = set(re.findall(r"R_\w+", "\n".join(body)))
        return [
            f"{unsigned(kind)} {register(name)} = {'tid & 1' if kind == 'pred' else '0xdeadbeefdeadbeefull'};"
            for kind, name in self._declared
            if register(name) in used
        ]

    def _statements(self, text: str, line: int) -> list[str]:
        parsed: list[str | tuple[int, str]] = []
        label, pending, start = "", "", line
        for row in text.split("\n"):
            row = row.split("//")[0].strip()
            start = start if pending else line
            line += 1
            if row == "}" and not pending:
                break
            if not row or row.startswith((".loc", ".file", ".pragma")):
                continue
            named = None if pending else re.match(r"([$\w]+):", row)
            if named:
                label = named[1]
                parsed.append(f"{label.replace('$', '_')}: ;")
                row = row[named.end() :].strip()
                if not row:
                    continue
            pending += " " + row
            if not pending.endswith(";"):
                continue
            for statement in filter(None, (part.strip() for part in pending.split(";"))):
                if statement.startswith(".reg"):
                    self._declare(statement)
                elif statement.startswith(".branchtargets"):
                    self._tables[label] = split(statement.removeprefix(".branchtargets"))
                else:
                    parsed.append((start, statement))
            pending = ""
        return [item if isinstance(item, str) else self._code(*item) for item in parsed]

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in split(names):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name)
            names = [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name]
            self._declared += [(kind[1:], one) for one in names]

    def _code(self, line: int, statement: str) -> str:
        guard = re.match(r"@(!?)(%\w+)\s+", statement)
        if guard:
            statement = statement[guard.end() :]
        name, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
        code = self._instruction(Instruction(line, name, split(rest)))
        return f"if ({guard[1]}{register(guard[2])}) {{ {code} }}" if guard else code

    def _instruction(self, i: Instruction) -> str:
        head = i.name.split(".")[0]
        if head == "bra":
            return f"goto {i.operands[0].replace('$', '_')};"
        if head == "ret":
            return "return;"
        if head == "brx":
            targets = enumerate(self._tables[i.operands[1]])
            cases = " ".join(f"case {k}: goto {target.replace('$', '_')};" for k, target in targets)
            cases += f'default: fault(m, tid, {i.line}, 0, "a branch to nowhere");'
            return f"switch ({bits(i.operands[0])}) {{ {cases} }}"
        if i.name == "bar.sync" and i.operands == ["0"]:
            return f"barrier(m, tid, {i.line});"
        if i.name.startswith("ld.param"):
            return f"{register(i.operands[0])} = m->parameters[{self._places[i.operands[1].strip('[]')]}];"
        if head == "atom" and "shared" in i.name and i.name.endswith("add.u32"):
            target, place, added = i.operands
            return f"{register(target)} = added(m, tid, {i.line}, {address(place)}, {bits(added)});"
        if head not in TRANSLATIONS:
            raise ValueError(f"no translation of {i}")
        return TRANSLATIONS[head](i)
