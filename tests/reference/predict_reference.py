"""Codec predict in float64 NumPy, written from FORMAT.md: encoder and decoder of one block."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from . import columns_reference as columns

HEADER_BYTES = 12
NO_SYMBOLS = 255
MAX_SHIFT = 4
MIN_FINENESS, MAX_FINENESS = -6, 12
MAX_RICE_BITS = 7
LARGEST_CLASS = 2 * 64 + 1
MIN_STEP, MAX_STEP = np.float32(1e-6), np.float32(1e6)
ESCAPE_BITS = 10


@dataclass
class Layer:
    """What a profile says of a layer; matrices are multiplied from the right."""

    n_heads: int
    head_dim: int
    mean: np.ndarray  # W
    deviation: np.ndarray  # W
    forward: np.ndarray  # W, W
    backward: np.ndarray  # W, W
    sources: tuple[int, ...] = ()
    maps: np.ndarray | None = None  # sources x W, W
    left: np.ndarray | None = None  # sources x W, rank
    right: np.ndarray | None = None  # rank, W
    convention: str = "none"
    start: int = 0
    cos: np.ndarray | None = None  # n_tokens, n_pairs or n_batch, n_tokens, n_pairs
    sin: np.ndarray | None = None

    @property
    def width(self):
        """K and V of all heads side by side."""
        return 2 * self.n_heads * self.head_dim

    @property
    def n_pairs(self):
        """Pairs of a head that are turned."""
        return 0 if self.convention == "none" else self.cos.shape[-1]

    def pairs(self):
        """Return where the first and where the second number of each pair stands in a head."""
        number = np.arange(self.n_pairs)
        if self.convention == "half":
            return self.start + number, self.start + self.n_pairs + number
        return self.start + 2 * number, self.start + 2 * number + 1


@dataclass
class Profile:
    """Tables and layers; None is a layer that takes no part."""

    tables: np.ndarray  # K, 256
    unit_table: int
    layers: list = field(default_factory=list)


# ---- between K and V and rows --------------------------------------------------------------------


def angles(layer, token_start, n_batch, n_tokens):
    """Return cosine and sine, n_batch x 1 x n_tokens x n_pairs."""
    found = []
    for table in (layer.cos, layer.sin):
        part = np.float64(table)[..., token_start : token_start + n_tokens, :]
        found.append(np.broadcast_to(part, (n_batch, n_tokens, layer.n_pairs))[:, None])
    return found


def turn(layer, keys, token_start, is_back):
    """Turn the pairs of keys, n_batch x n_heads x n_tokens x head_dim, by their angle or back."""
    keys = np.float64(keys).copy()
    if layer.convention == "none":
        return keys
    cos, sin = angles(layer, token_start, keys.shape[0], keys.shape[2])
    first, second = layer.pairs()
    x, y = keys[..., first], keys[..., second]
    if is_back:
        square = cos**2 + sin**2
        keys[..., first] = (x * cos + y * sin) / square
        keys[..., second] = (y * cos - x * sin) / square
    else:
        keys[..., first] = x * cos - y * sin
        keys[..., second] = y * cos + x * sin
    return keys


def to_rows(layer, keys, values, token_start=0):
    """Return centred rows, one for each batch row and token."""
    both = np.concatenate([turn(layer, keys, token_start, True), np.float64(values)], axis=1)
    return both.transpose(0, 2, 1, 3).reshape(-1, layer.width) - np.float64(layer.mean)


def from_rows(layer, rows, n_batch, token_start=0):
    """Return keys and values of centred rows."""
    shape = (n_batch, -1, 2 * layer.n_heads, layer.head_dim)
    both = (rows + np.float64(layer.mean)).reshape(shape).transpose(0, 2, 1, 3)
    keys, values = both[:, : layer.n_heads], both[:, layer.n_heads :]
    return turn(layer, keys, token_start, False), values.copy()


def rounded(values):
    """Return numbers rounded to bfloat16, halves to even, by way of float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.float64(bits.view(np.float32))


def predicted(layer, decoded, is_rounded=False):
    """Return the prediction from what was decoded of the sources, by layer."""
    if not layer.sources:
        return 0.0
    factor = rounded if is_rounded else np.float64
    together = factor(np.concatenate([decoded[source] for source in layer.sources], axis=1))
    if layer.left is not None:
        return factor(together @ np.float64(layer.left)) @ np.float64(layer.right)
    return together @ np.float64(layer.maps)


# ---- side information ----------------------------------------------------------------------------


def level_of(value):
    """Return 3 log2(value), rounded down, without a rounding."""
    cube = Fraction(float(value)) ** 3
    level = cube.numerator.bit_length() - cube.denominator.bit_length()
    return level if cube >= Fraction(2) ** level else level - 1


def expected_classes(profile, layer, step):
    """Return the class that the profile expects of each component."""
    levels = np.array([level_of(value) for value in layer.deviation]) - level_of(step)
    return np.clip(profile.unit_table + levels, 0, len(profile.tables) - 1)


def fold(value):
    """0, -1, 1, -2 ... as 0, 1, 2, 3 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unfold(folded):
    """Return the inverse."""
    return folded // 2 if folded % 2 == 0 else -(folded // 2) - 1


def rice(values, rice_bits):
    """Return the bits of folded numbers."""
    bits = []
    for value in values:
        bits += [1] * (value >> rice_bits) + [0]
        bits += [value >> i & 1 for i in range(rice_bits)]
    return bits


def best_rice_bits(values):
    """Return the least of those that make fewest bits."""
    return min(range(MAX_RICE_BITS + 1), key=lambda bits: len(rice(values, bits)))


def take_rice(bits, rice_bits, largest):
    """Take one folded number from an iterator of bits."""
    upper = 0
    for bit in bits:
        if bit == 0:
            break
        upper += 1
    else:
        raise ValueError("the bits end")
    lower = [next(bits, None) for _ in range(rice_bits)]
    if None in lower:
        raise ValueError("the bits end")
    value = (upper << rice_bits) + sum(bit << i for i, bit in enumerate(lower))
    if value > largest:
        raise ValueError(f"{value} is above {largest}")
    return value


# ---- blocks --------------------------------------------------------------------------------------


@dataclass
class Parsed:
    """What a block says."""

    step: float
    classes: np.ndarray
    fineness: np.ndarray
    shifts: np.ndarray  # fineness included
    values: np.ndarray  # W, n_rows

    @property
    def numbers(self):
        """What the rows are multiples of, n_rows, W."""
        return (self.step * row_steps(self.fineness) * self.values).T


def row_steps(fineness):
    """Return parts of the step, as float32 has them."""
    return np.float64(np.float32(2.0 ** (-np.asarray(fineness, np.float64) / 3)))


def write(profile, layer, block):
    """Return the bytes of a block."""
    expected = expected_classes(profile, layer, np.float32(block.step))
    actual = [-1 if own == NO_SYMBOLS else int(own) for own in block.classes]
    classes = [fold(own - int(other)) for own, other in zip(actual, expected, strict=True)]
    finenesses = [fold(int(fineness)) for fineness in block.fineness]
    shifts = [fold(int(x)) for x in block.shifts.astype(int) - block.fineness]
    class_bits, shift_bits = best_rice_bits(classes), best_rice_bits(shifts)
    fineness_bits, bits = 0, rice(classes, class_bits)
    if any(finenesses):
        fineness_bits = 1 + best_rice_bits(finenesses)
        bits += rice(finenesses, fineness_bits - 1)
    side = np.packbits(bits + rice(shifts, shift_bits), bitorder="little")
    header = np.array([block.step], "<f4").tobytes() + np.array([len(side)], "<u4").tobytes()
    stream = columns.encode(block.values, profile.tables, block.classes, block.shifts)
    about = bytes([class_bits, shift_bits, fineness_bits, 0])
    return header + about + side.tobytes() + stream


def read(profile, layer, payload, n_rows):
    """Parse a block; ValueError for what is malformed."""
    payload = bytes(payload)
    if len(payload) < HEADER_BYTES:
        raise ValueError("too short")
    step = np.frombuffer(payload[:4], "<f4")[0]
    side_bytes = int.from_bytes(payload[4:8], "little")
    class_bits, shift_bits, fineness_bits, zero = payload[8:12]
    side = payload[HEADER_BYTES : HEADER_BYTES + side_bytes]
    if not MIN_STEP <= step <= MAX_STEP or len(side) != side_bytes or zero:
        raise ValueError("header")
    if max(class_bits, shift_bits, fineness_bits - 1) > MAX_RICE_BITS:
        raise ValueError("Rice parameters")
    all_bits = np.unpackbits(np.frombuffer(side, np.uint8), bitorder="little").tolist()
    bits = iter(all_bits)
    classes = np.zeros(layer.width, np.uint8)
    for i, expected in enumerate(expected_classes(profile, layer, step)):
        own = unfold(take_rice(bits, class_bits, LARGEST_CLASS)) + int(expected)
        if not -1 <= own < len(profile.tables):
            raise ValueError(f"class {own}")
        classes[i] = NO_SYMBOLS if own == -1 else own
    fineness = np.zeros(n_rows, np.int8)
    for i in range(n_rows if fineness_bits else 0):
        fineness[i] = unfold(take_rice(bits, fineness_bits - 1, 2 * MAX_FINENESS))
        if fineness[i] < MIN_FINENESS:
            raise ValueError(f"fineness {fineness[i]}")
    shifts = [unfold(take_rice(bits, shift_bits, 2 * MAX_SHIFT)) for _ in range(n_rows)]
    padding = list(bits)
    if len(padding) > 7 or any(padding):
        raise ValueError("padding")
    shifts = fineness + np.array(shifts, np.int8)
    values = columns.decode(
        payload[HEADER_BYTES + side_bytes :], layer.width, n_rows, profile.tables, classes, shifts
    )
    return Parsed(float(step), classes, fineness, shifts, values)


def decode(profile, index, payload, decoded, n_rows, is_rounded=False):
    """Return the centred rows of a block; `decoded` has those of its sources."""
    layer = profile.layers[index]
    block = read(profile, layer, payload, n_rows)
    numbers = block.numbers
    if is_rounded:
        numbers = block.step * rounded(numbers / block.step)
    return predicted(layer, decoded, is_rounded) + numbers @ np.float64(layer.backward)


def coefficients(profile, index, rows, decoded, steps):
    """Return what the quantiser rounds, in steps, one for all rows or one for each: W x n_rows."""
    layer = profile.layers[index]
    return ((rows - predicted(layer, decoded)) @ np.float64(layer.forward)).T / steps


def costs(tables):
    """Return the bits of each symbol by table; an escape stands for what a table leaves out."""
    frequencies = np.float64(tables)
    is_escape = frequencies == 0
    is_escape[:, NO_SYMBOLS] = True
    escape = np.broadcast_to(frequencies[:, NO_SYMBOLS:], frequencies.shape)
    return np.log2(4096 / np.where(is_escape, escape, frequencies)) + ESCAPE_BITS * is_escape


def symbols_of(values):
    """Return symbols, 255 for what is too large for one."""
    return np.where(np.abs(values) <= 127, values + 127, 255)


def class_bits(profile, column, fineness):
    """Return the bits of a column by class."""
    n_tables = len(profile.tables)
    tables = np.clip(np.arange(n_tables)[:, None] + fineness, 0, n_tables - 1)
    return costs(profile.tables)[tables, symbols_of(column)].sum(1)


def shift_bits(profile, classes, values, fineness):
    """Return the bits of each row by shift, -4 to 4, what telling it takes included."""
    table_costs = costs(profile.tables)
    used = classes != NO_SYMBOLS
    symbols = symbols_of(values[used])
    found = []
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        tables = classes[used].astype(int)[:, None] + fineness + shift
        tables = np.clip(tables, 0, len(profile.tables) - 1)
        found.append(table_costs[tables, symbols].sum(0) + abs(shift))
    return np.array(found)


def encode(profile, index, rows, decoded, step, fineness=0):
    """Return a block's bytes and what will be decoded of it."""
    layer = profile.layers[index]
    step = float(np.float32(step))
    fineness = np.broadcast_to(np.int8(fineness), len(rows))
    steps = step * row_steps(fineness)
    values = np.rint(coefficients(profile, index, rows, decoded, steps)).astype(np.int64)
    classes = np.array(
        [
            class_bits(profile, column, fineness).argmin() if column.any() else NO_SYMBOLS
            for column in values
        ],
        np.uint8,
    )
    shifts = shift_bits(profile, classes, values, fineness).argmin(0) - MAX_SHIFT
    block = Parsed(step, classes, fineness, (shifts + fineness).astype(np.int8), values)
    decoded_now = predicted(layer, decoded) + block.numbers @ np.float64(layer.backward)
    return write(profile, layer, block), decoded_now
