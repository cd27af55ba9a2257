"""Rewriting of ONNX graphs; what a graph computes stays the same, up to the rounding of float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnnpipe.manifest import INPUT_NAME

__all__ = ["end_in_float32", "feed_pixels", "fuse_dense_layers", "simplify_graph"]

_PIXELS_MERGED: Final = 4
"""Neighbours of a row that `feed_pixels` makes one pixel of. Measured for 32x32 images, in µs an image and thread:
58 as it is, 40 with 2 pixels, 21 with 4, 31 with 8; float32 20, and 35 more to bring the result into int8's layout."""

_TO_NCHW: Final = [0, 3, 1, 2]
_TO_NHWC: Final = [0, 2, 3, 1]


def simplify_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without what the conversion leaves over; what it computes stays the same.

    - a Reshape to a shape computed at run time, of which only the batch is unknown, gets a constant shape;
    - `x + 0` goes (Keras' Rescaling adds its offset even where it is 0);
    - nodes and constants that nothing uses any more go.
    """
    # With data propagation, because the shapes sought are themselves computed by nodes.
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] not in constants:
            sizes = [dim.dim_value for dim in shapes.get(node.output[0], ())]
            if sizes and all(sizes[1:]):
                node.input[1] = _add_constant(graph, f"{node.output[0]}/shape", np.array([-1, *sizes[1:]], np.int64))
    _bypass_nodes(graph, lambda node: _adds_zero(node, constants))
    _remove_unused(graph)
    del graph.value_info[:]
    return model


def _adds_zero(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Add" or node.input[1] not in constants:
        return False
    addend = numpy_helper.to_array(constants[node.input[1]])
    return addend.size == 1 and not addend.any()


def fuse_dense_layers(model: onnx.ModelProto) -> None:
    """Make one Gemm of each MatMul and Add of a dense layer, so that its result is rounded to int8 once, not twice."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = _users(graph)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        following = users.get(node.output[0], [])
        if node.op_type != "MatMul" or ranks.get(node.input[0]) != 2 or node.input[1] not in constants:
            continue
        if len(following) != 1 or following[0].op_type != "Add" or node.output[0] in outputs:
            continue
        (bias,) = [name for name in following[0].input if name != node.output[0]] or [""]
        if bias in constants and list(constants[bias].dims) == [constants[node.input[1]].dims[1]]:
            node.op_type = "Gemm"
            node.input.append(bias)
            node.output[0] = following[0].output[0]
            following[0].output[0] += "/fused"  # nothing reads it: it goes below
    _remove_unused(graph)


def end_in_float32(model: onnx.ModelProto) -> None:
    """Let a softmax that is computed in float32 give the output itself, not by way of fp16 and back.

    Also brings the nodes into their order, which the conversion to fp16 does not keep.
    """
    graph = model.graph
    _sort_nodes(graph)
    output = graph.output[0].name
    producers = {name: node for node in graph.node for name in node.output}
    casts, node = [], producers[output]
    while node.op_type == "Cast":
        casts.append(node)
        node = producers[node.input[0]]
    if node.op_type == "Softmax" and casts:
        casts[0].output[0] = f"{output}/cast"  # nothing reads it: it goes below
        node.output[0] = output
        _remove_unused(graph)


@dataclass(frozen=True)
class _Front:
    """The way of the pixels into the first convolution: a cast, a factor, and channels first."""

    conv: onnx.NodeProto
    scale: np.float32
    """What the pixels are multiplied with."""
    image_size: tuple[int, int]
    """(height, width)."""


def feed_pixels(model: onnx.ModelProto) -> None:
    """Let the first convolution of a network take the pixels as the quantised numbers that they are.

    `Cast, Mul, Transpose` become `Transpose, DequantizeLinear` with the factor as its scale: exactly the same numbers,
    and an int8 kernel reads the image itself. Where its shape allows, the convolution then takes 4 neighbours of a row
    as one pixel of 12 channels, because int8 kernels copy what they multiply, 3 bytes at a time for 3 channels.
    A network that begins otherwise is left as it is.
    """
    front = _find_front(model)
    if front is None:
        return
    graph = model.graph
    merged = _merge_weights(graph, front)
    (height, width), channels = front.image_size, 3
    nodes = []
    source = INPUT_NAME
    if merged:
        shape = np.array([-1, height, width // _PIXELS_MERGED, channels * _PIXELS_MERGED], np.int64)
        inputs = [source, _add_constant(graph, "pixels/merged/shape", shape)]
        nodes.append(helper.make_node("Reshape", inputs, ["pixels/merged"]))
        source = "pixels/merged"
    scale = _add_constant(graph, "pixels/scale", np.asarray(front.scale, np.float32))
    zero = _add_constant(graph, "pixels/zero", np.asarray(0, np.uint8))
    nodes.append(helper.make_node("Transpose", [source], ["pixels/nchw"], perm=_TO_NCHW))
    nodes.append(helper.make_node("DequantizeLinear", ["pixels/nchw", scale, zero], ["pixels/scaled"]))
    front.conv.input[0] = "pixels/scaled"
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)
    if merged:
        _separate_pixels(graph, front)
    _remove_unused(graph)
    del graph.value_info[:]


def _find_front(model: onnx.ModelProto) -> _Front | None:
    """Return how the pixels reach the first convolution, or None if they do it in another way."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users = _users(graph)
    found: list[str] = []
    scale, name = np.float32(1), INPUT_NAME
    while len(users.get(name, [])) == 1:
        node = users[name][0]
        if node.op_type == "Conv" and sorted(found) == ["Cast", "Mul", "Transpose"] and node.input[0] == name:
            sizes = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
            return _Front(node, scale, (sizes[1], sizes[2]))
        if node.op_type == "Mul":
            factor = [constants[each] for each in node.input if each in constants]
            if len(factor) != 1 or factor[0].size != 1:
                return None
            scale = np.float32(factor[0].item())
        elif node.op_type == "Transpose":
            if _attributes(node).get("perm") != _TO_NCHW:
                return None
        elif node.op_type != "Cast" or _attributes(node)["to"] != TensorProto.FLOAT:
            return None
        found.append(node.op_type)
        name = node.output[0]
    return None


def _merge_weights(graph: onnx.GraphProto, front: _Front) -> bool:
    """Make the first convolution one over groups of neighbours in a row, if its shape allows, and return whether.

    Output pixel p of a group and tap t of the kernel meet at input pixel p + t - left, which lies in a group to the
    left or right, or in the same. Zeros beside the image stay zeros: they are whole groups.
    """
    conv, size = front.conv, _PIXELS_MERGED
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    attributes = _attributes(conv)
    if conv.input[1] not in tensors or any(name not in tensors for name in conv.input[2:]):
        return False
    weights = numpy_helper.to_array(tensors[conv.input[1]])  # (filters, channels, height, width)
    filters, channels, rows, columns = weights.shape
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    plain = {"group": 1, "dilations": [1, 1], "strides": [1, 1], "auto_pad": b"NOTSET"}
    same_width = left + right == columns - 1
    if any(attributes.get(name, value) != value for name, value in plain.items()) or not same_width or columns < 2:
        return False
    if front.image_size[1] % size or channels != 3 or top + bottom != rows - 1:
        return False
    first, last = -left // size, (size - 1 + right) // size  # groups, counted from that of the output
    merged = np.zeros((size, filters, size, channels, rows, last - first + 1), np.float32)
    for pixel in range(size):
        for tap in range(columns):
            group, place = divmod(pixel + tap - left, size)
            merged[pixel, :, place, :, :, group - first] = weights[..., tap]
    new = {"weights": merged.reshape(size * filters, size * channels, rows, -1)}
    if len(conv.input) > 2:
        new["bias"] = np.tile(numpy_helper.to_array(tensors[conv.input[2]]), size)
    for index, (name, values) in enumerate(new.items(), start=1):
        conv.input[index] = _add_constant(graph, f"pixels/{name}", values)
    del conv.attribute[:]
    conv.attribute.append(helper.make_attribute("kernel_shape", [rows, last - first + 1]))
    conv.attribute.append(helper.make_attribute("pads", [top, -first, bottom, last]))
    return True


def _separate_pixels(graph: onnx.GraphProto, front: _Front) -> None:
    """Make single pixels again of what the merged convolution gives, behind the Relu that is computed with it."""
    last = front.conv
    users = _users(graph).get(last.output[0], [])
    if [node.op_type for node in users] == ["Relu"]:
        last = users[0]
    filters = next(t.dims[0] for t in graph.initializer if t.name == front.conv.input[1]) // _PIXELS_MERGED
    shape = _add_constant(graph, "pixels/separate/shape", np.array([-1, *front.image_size, filters], np.int64))
    output, last.output[0] = last.output[0], "pixels/filtered"
    nodes = (
        helper.make_node("Transpose", ["pixels/filtered"], ["pixels/filtered/nhwc"], perm=_TO_NHWC),
        helper.make_node("Reshape", ["pixels/filtered/nhwc", shape], ["pixels/separate"]),
        helper.make_node("Transpose", ["pixels/separate"], [output], perm=_TO_NCHW),
    )
    position = list(graph.node).index(last) + 1
    for index, node in enumerate(nodes):
        graph.node.insert(position + index, node)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _users(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each tensor."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            users.setdefault(name, []).append(node)
    return users


def _add_constant(graph: onnx.GraphProto, name: str, value: npt.NDArray[Any]) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Bring the nodes into an order in which each comes behind those whose results it reads."""
    made_by_nodes = {name for node in graph.node for name in node.output}
    available = {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if not (set(node.input) & made_by_nodes) - available]
        if not ready:
            raise ValueError("the graph has a cycle")
        ordered += [onnx.NodeProto.FromString(node.SerializeToString()) for node in ready]
        available.update(name for node in ready for name in node.output)
        waiting = [node for node in waiting if set(node.output) - available]
    del graph.node[:]
    graph.node.extend(ordered)


def _bypass_nodes(graph: onnx.GraphProto, passes_through: Callable[[onnx.NodeProto], bool]) -> None:
    """Let the users of each such node's output read its first input instead."""
    outputs = {value.name for value in graph.output}
    replaced: dict[str, str] = {}
    for node in graph.node:  # topological order: an input has been replaced before it is read
        for index, name in enumerate(node.input):
            node.input[index] = replaced.get(name, name)
        if passes_through(node) and node.output[0] not in outputs:
            replaced[node.output[0]] = node.input[0]


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and constants from which no output follows."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, content in ((graph.node, kept[::-1]), (graph.initializer, tensors)):
        copies = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(copies)
