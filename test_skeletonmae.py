"""Tests: every equation, reader and script against an independent plain implementation. Needs torch and this folder alone.

    python test_skeletonmae.py                # everything, under 3 minutes on 2 cores; ends with "N passed, N failed, N skipped"
    python test_skeletonmae.py NpzTest        # one class, or one test as NpzTest.test_name
    python test_skeletonmae.py --thorough     # 50 kills, 2,000 mutations of each file, 5,000 steps: up to 20 minutes
    python test_skeletonmae.py --speed        # the rows of the README's speed table; --speed P1 P4 for some of them

Sources in the docstrings: "S" the paper's supplement, "METHOD" what was decided where both are silent.
Shapes as in skeletonmae.py. Order: the model, data files and batches, the scripts, the figures.
"""
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import ast
import contextlib
import copy
import copyreg
import csv
import glob
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import statistics as stats
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import unittest
import unittest.mock
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import skeletonmae
import train_finetune
import train_pretrain
from data import Augmentation, DataError, Loader, Sequences
from skeletonmae import (SKELETONS, Attention, AttentionBlock, BatchNorm, GraphConvolution, GraphEncoder, JointEmbedding, LinearProbe,
                         Packing, SkeletonClassifier, SkeletonMAE, TemporalPooling, bone_parents, concat_linear, draw_mask,
                         find_present, make_skeleton, normalized_adjacency, reweighted_cosine_error)

visualize = None
if Path(__file__).with_name("visualize.py").exists():  # it is optional
    import visualize

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)

COCO = SKELETONS["coco17"]
STAR = make_skeleton("hip chest head left_hand right_hand", [(0, 1), (1, 2), (1, 3), (1, 4)],  # a user's own skeleton
                dict(trunk=[0, 1], head=[2], left=[3], right=[4]), centre=0)
STAR_PARENTS = [0, 0, 1, 1, 1]
SMALL = dict(width=8, hidden=8, layers=2)
tiny_mae = partial(SkeletonMAE, STAR, 2, mask_parts=["left"], **SMALL)
tiny_classifier = partial(SkeletonClassifier, **SMALL, strl_layers=2, blocks=1, heads=2, ratio=2, frames=6)


# ---------------------------------------------------------------------------------------------- plain implementations

def shaken(module):
    """The module in eval mode without zeros and ones, so that a forgotten bias, norm or running statistic shows."""
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for name, value in module.named_buffers():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    return module.eval()


def people(N, M, T, V, C, absent=()):
    """Random skeletons (N, M, T, V, C); the (sequence, person) pairs of `absent` are all zero."""
    x = torch.randn(N, M, T, V, C)
    for n, m in absent:
        x[n, m] = 0
    return x


def statistics(module):
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


def gradients(module, x, out, direction):
    return torch.autograd.grad(out, [x, *module.parameters()], direction.to(out.dtype))


def plain_batch_norm(norm, x):
    return (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias


def plain_layer_norm(norm, x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_graph_layer(layer, h, edges, training=False):
    """S Eq. 1, joint by joint: h (V, ..., in) -> (V, ..., out)."""
    degree = [1 + sum(v in edge for edge in edges) for v in range(len(h))]
    rows = [h[v] / degree[v] for v in range(len(h))]
    for i, j in [*edges, *(edge[::-1] for edge in edges)]:
        rows[i] = rows[i] + h[j] / math.sqrt(degree[i] * degree[j])
    z, norm = torch.stack(rows) @ layer.linear.weight.T, layer.norm
    z = F.batch_norm(z.flatten(0, -2), norm.running_mean, norm.running_var, norm.weight, norm.bias, training).view(z.shape)
    return F.prelu(z, layer.activation.weight)


def plain_attention(attention, g):
    """softmax(Q K^T / sqrt(d)) V of one person, head by head: (T, H) -> (T, H)."""
    width, heads = g.shape[-1] // attention.heads, []
    for query, key, value in zip(*(part.split(width, 1) for part in attention.query_key_value(g).chunk(3, 1))):
        scores = torch.exp(query @ key.T / math.sqrt(width))
        heads.append(scores / scores.sum(1, keepdim=True) @ value)
    return attention.project(torch.cat(heads, 1))


def plain_attention_block(block, g):
    norm, widen, _, narrow, _ = block.feed_forward
    g = g + plain_attention(block.attention, plain_layer_norm(block.attention_norm, g))
    return g + narrow(F.gelu(widen(plain_layer_norm(norm, g))))


def plain_pooling(pool, h, stride):
    """METHOD's four branches, frame by frame: (V, T, D) -> (V, ceil(T / stride), D)."""
    T, B, frames = h.shape[1], h.shape[2] // 4, []
    x = plain_batch_norm(pool.reduce_norm, h @ pool.reduce.weight.T).relu()
    for t in range(0, T, stride):
        near, far = (sum(x[:, t + d * k, b * B:(b + 1) * B] @ branch.weight[:, (k + 1) * B:(k + 2) * B].T
                         for k in (-1, 0, 1) if 0 <= t + d * k < T)
                     for b, d, branch in ((0, 1, pool.near), (1, 2, pool.far)))
        largest = x[:, max(t - 1, 0):t + 2, 2 * B:3 * B].amax(1)
        frames.append((plain_batch_norm(pool.norm, torch.cat([near, far, largest, x[:, t, 3 * B:]], 1)) + h[:, t]).relu())
    return torch.stack(frames, 1)


def plain_strl(layer, persons, previous, edges, stride):
    """Paper Eq. 3, S Eq. 2 and paper Eq. 4 of one sequence. persons, previous: person -> H (V, T, D) and SM (V, T, H + D)."""
    own, out = {}, {}
    for person, h in persons.items():
        g = h
        for graph_layer in layer.encoder.layers:
            g = plain_graph_layer(graph_layer, g, edges)
        g = plain_layer_norm(layer.token_norm, g.sum(0))
        for block in layer.attention:
            g = plain_attention_block(block, g)
        own[person] = torch.cat([torch.stack([g] * len(h)), h], 2)  # Concat(Repeat(g; V), h)
    for person, h in persons.items():
        mixed = own[person] @ layer.own.weight.T
        if 1 - person in persons:  # W of the concatenation of both persons' SM
            mixed = (torch.cat([own[person], (previous or own)[1 - person]], 2)
                     @ torch.cat([layer.own.weight, layer.other.weight], 1).T)
        out[person] = plain_pooling(layer.pool, (plain_batch_norm(layer.norm, mixed) + layer.residual(h)).relu(), stride)
    return out, {person: sm[:, ::stride] for person, sm in own.items()}


def plain_classifier(model, x, present, strides):
    """Logits of x (N, M, T, V, C), sequence by sequence."""
    frames, T, logits, position = len(model.strl.position), x.shape[2], [], []
    for t in range(T):  # the table of positions, linearly interpolated to T frames
        low = min(t * (frames - 1) // (T - 1), frames - 2)
        share = t * (frames - 1) / (T - 1) - low
        position.append((1 - share) * model.strl.position[low] + share * model.strl.position[low + 1])
    for n in range(len(x)):
        persons = {m: model.embedding(x[n, m].transpose(0, 1)[:, None])[:, 0] + torch.stack(position)
                   for m in range(x.shape[1]) if present[n, m]}
        previous = None
        for layer, stride in zip(model.strl.layers, strides):
            persons, previous = plain_strl(layer, persons, previous, model.skeleton["edges"], stride)
        pooled = [torch.cat([h.mean((0, 1)), h.mean(0).amax(0)]) for h in persons.values()]
        logits.append(model.head(model.hidden_layer(sum(pooled) / len(pooled))))
    return torch.stack(logits)


def plain_embedding(e, x, mask):
    """JointEmbedding of STAR, joint by joint, in eval mode: x (V, P, T, C), mask (V, P) or (V, P, T) -> (V, P, T, D)."""
    V, P, T, _ = x.shape
    mask = mask.reshape(V, P, -1).expand(V, P, T)
    out, norm = torch.empty(V, P, T, 8), {name: value.view(V, -1) for name, value in e.norm.state_dict().items() if value.dim()}
    for v, p, t in product(range(V), range(P), range(T)):
        here, parent = x[v, p, t, :2], STAR_PARENTS[v]
        motion = x[v, p, t + 1, :2] - here if t + 1 < T else torch.zeros(2)
        streams = torch.cat([here] + [motion] * e.motion + [here - x[parent, p, t, :2]] * e.bone + [x[v, p, t, 2:]] * e.score)
        streams = (streams - norm["running_mean"][v]) / (norm["running_var"][v] + 1e-5).sqrt() * norm["weight"][v] + norm["bias"][v]
        if e.bone and (mask[v, p, t] or mask[parent, p, t]):
            streams[2 + 2 * e.motion:][:2] = 0
        if e.motion and t + 1 < T and mask[v, p, t + 1]:
            streams[2:4] = 0
        out[v, p, t] = (e.mask_token if mask[v, p, t] else e.linear(streams)) + e.joint[v]
    return out


class Seeded(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- skeletons and masks

class SkeletonTest(Seeded):
    ORDERS = dict(
        kinect20="hip centre, spine, shoulder centre, head, left shoulder, elbow, wrist, hand, right shoulder, elbow, wrist, hand, "
                 "left hip, knee, ankle, foot, right hip, knee, ankle, foot",
        penn13="head, left shoulder, right shoulder, left elbow, right elbow, left wrist, right wrist, left hip, right hip, left knee, "
               "right knee, left ankle, right ankle",
        sbu15="head, neck, torso, left shoulder, elbow, hand, right shoulder, elbow, hand, left hip, knee, foot, right hip, knee, foot",
        coco17="nose, left eye, right eye, left ear, right ear, left shoulder, right shoulder, left elbow, right elbow, "
               "left wrist, right wrist, left hip, right hip, left knee, right knee, left ankle, right ankle",
        ntu25="spine base, spine middle, the neck, head, left shoulder, elbow, wrist, hand, right shoulder, elbow, wrist, hand, "
              "left hip, knee, ankle, foot, right hip, knee, ankle, foot, spine shoulder, left hand_tip, thumb, right hand_tip, thumb",
        openpose18="nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee, ankle, left hip, knee, ankle, "
                   "right eye, left eye, right ear, left ear",
        jhmdb15="neck, belly, face, right shoulder, left shoulder, right hip, left hip, right elbow, left elbow, right knee, left knee, "
                "right wrist, left wrist, right ankle, left ankle")

    def test_joint_orders(self):
        """Joint names in the order of the data's documentation, where "left shoulder, elbow" means that both are left
        and "the neck" that it is neither."""
        for layout, order in self.ORDERS.items():
            names, side = [], ""
            for name in order.replace(" centre", "_centre").split(", "):
                side, name = name.split() if " " in name else (side, name)
                names.append(name if side in ("", "the") else f"{side}_{name}")
            self.assertEqual(SKELETONS[layout]["joints"], names)

    def test_layouts(self):
        """Joint counts; edges form a tree; six disjoint parts cover all joints (paper 3.1.2); left mirrors right."""
        counts = dict(coco17=17, ntu25=25, kinect20=20, sbu15=15, penn13=13, jhmdb15=15, openpose18=18)
        self.assertEqual({name: len(set(layout["joints"])) for name, layout in SKELETONS.items()}, counts)
        self.assertEqual({tuple(layout["parts"]) for layout in SKELETONS.values()},
                         {("head", "torso", "left_arm", "right_arm", "left_leg", "right_leg")})
        for layout in SKELETONS.values():
            joints, edges, parts = layout["joints"], layout["edges"], layout["parts"]
            group = list(range(len(joints)))
            for i, j in edges:  # a tree: each edge joins two groups, and one group is left
                self.assertNotEqual(group[i], group[j])
                group = [group[i] if g == group[j] else g for g in group]
            self.assertEqual(len(set(group)), 1)
            self.assertTrue(all(parts.values()))
            self.assertEqual(sorted(sum(parts.values(), [])), list(range(len(joints))))
            pairs = [(joints.index(name.replace("right", "left")), j) for j, name in enumerate(joints) if name.startswith("right")]
            self.assertCountEqual(map(tuple, layout["pairs"]), pairs)
            mirror = {**dict(enumerate(range(len(joints)))), **dict(pairs), **{j: i for i, j in pairs}}
            self.assertEqual({frozenset(mirror[j] for j in edge) for edge in edges}, set(map(frozenset, edges)))
            for part, mirrored in dict(head="head", torso="torso", left_arm="right_arm", left_leg="right_leg").items():
                self.assertEqual({mirror[j] for j in parts[part]}, set(parts[mirrored]))
                self.assertTrue(all(joints[j].startswith("left") for j in parts[part]) or part == mirrored)

    def test_bone_parents(self):
        """Every joint's parent is a neighbour, and following the parents ends at the first centre joint."""
        self.assertEqual(bone_parents(STAR), STAR_PARENTS)
        for layout in SKELETONS.values():
            parents = bone_parents(layout)
            for path in [[joint] for joint in range(len(parents))]:
                while parents[path[-1]] != path[-1] and len(path) <= len(parents):
                    path.append(parents[path[-1]])
                    self.assertIn(set(path[-2:]), map(set, layout["edges"]))
                self.assertEqual(path[-1], layout["centre"][0])

    def test_iterators_make_a_skeleton(self):
        """Edges and pairs may come as a zip: they are read once."""
        made = make_skeleton("a b c", zip([0, 1], [1, 2]), {"all": [0]}, 0, zip([1], [2]))
        self.assertEqual((made["edges"], made["pairs"]), ([[0, 1], [1, 2]], [[1, 2]]))

    def test_bad_skeletons(self):
        """A user's mistake is a ValueError: an index out of range, no part, an empty part, no centre."""
        for edges, parts, centre in (([(0, 5)], {"a": [0]}, 0),
                                     ([(0, -1)], {"a": [0]}, 0),
                                     ([(0, 1)], {}, 0),
                                     ([(0, 1)], {"a": []}, 0),
                                     ([(0, 1)], {"a": [2]}, 0),
                                     ([(0, 1)], {"a": [0]}, []),
                                     ([(0, 1)], {"a": [0]}, 2)):
            self.assertRaises(ValueError, make_skeleton, "a b", edges, parts, centre)
        for triple in (dict(edges=[(0, 1, 2)]), dict(edges=[(0, 1)], pairs=[(0, 1, 2)])):
            self.assertRaises(ValueError, make_skeleton, "a b c", parts={"a": [0]}, centre=0, **triple)
        for pairs in ([(0, 1), (1, 2)], [(0, 0)]):  # a mirror would lose a joint
            with self.assertRaisesRegex(ValueError, "pairs"):
                make_skeleton("a b c", [(0, 1)], {"a": [0]}, 0, pairs)

    def masked(self, num=60, layout=COCO, **how):
        """The set of masked joints (True, not False) of every sequence."""
        return [frozenset(row.nonzero().flatten().tolist()) for row in draw_mask(num, layout, **how)]

    def test_mask_parts(self):
        """Default: right arm and right leg (METHOD); named parts; or K whole parts per sequence (paper 3.1.2), every union of K drawn."""
        self.assertEqual(set(self.masked()), {frozenset([8, 10, 14, 16])})
        self.assertEqual(set(self.masked(parts=["head", "left_leg"])), {frozenset([0, 1, 2, 3, 4, 13, 15])})
        self.assertEqual(set(self.masked(layout=STAR, parts=["right"])), {frozenset([4])})
        for count in (1, 2, 5):
            self.assertEqual(set(self.masked(300, num_parts=count)),
                             {frozenset(sum(parts, [])) for parts in combinations(COCO["parts"].values(), count)})

    def test_mask_ratio(self):
        """Exactly round(R V) joints (S Table 2), others in every sequence, each joint as often as any other."""
        for how in (dict(ratio=0.5), dict(num_parts=2)):  # a generator makes the draw repeatable
            equal(*(draw_mask(60, COCO, **how, generator=torch.Generator().manual_seed(1)) for _ in range(2)))
        for ratio, count in ((0.3, 5), (0.5, 8), (0.7, 12), (0.9, 15)):
            masked = self.masked(600, ratio=ratio)
            self.assertEqual({len(joints) for joints in masked}, {count})
            self.assertGreater(len(set(masked)), 100)
            for joint in range(17):
                self.assertAlmostEqual(sum(joint in joints for joints in masked) / 600, count / 17, delta=0.09)

    def test_mask_segments(self):
        """Every segment of the frames has a mask of its own, the frames of a segment share it; one segment: a mask for all frames."""
        self.assertEqual(SkeletonMAE(COCO, 2, 8, 8, mask_ratio=0.5).draw(3, 10).shape, (3, 1, 17))
        masks = SkeletonMAE(COCO, 2, 8, 8, mask_ratio=0.5, mask_segments=4).draw(20, 10)
        self.assertEqual((masks.shape, set(masks.sum(2).flatten().tolist())), ((20, 10, 17), {8}))
        for mask in masks:
            change = [t for t in range(1, 10) if not mask[t].equal(mask[t - 1])]
            self.assertEqual(change, [3, 5, 8])  # frames 0 to 2, 3 and 4, 5 to 7, 8 and 9

    def test_mask_refused(self):
        """Never all joints and never none (METHOD); an unknown part or loss is answered with the known ones, when the model is built."""
        for how in (dict(ratio=1.0), dict(ratio=0.01), dict(ratio=-0.5), dict(num_parts=6), dict(num_parts=7), dict(num_parts=-1),
                    dict(parts=list(COCO["parts"])), dict(parts=())):
            self.assertRaises(ValueError, draw_mask, 2, COCO, **how)
        with self.assertRaisesRegex(ValueError, "right_arm, right_leg.*trunk, head, left, right"):
            SkeletonMAE(STAR, 2)
        overlapping = make_skeleton("a b c", [(0, 1), (1, 2)], dict(left=[0, 1], middle=[1], right=[1, 2]), 1)
        self.assertEqual(len(SkeletonMAE(overlapping, 2, mask_num_parts=1).draw(9, 4)), 9)
        with self.assertRaisesRegex(ValueError, "all joints"):
            SkeletonMAE(overlapping, 2, mask_num_parts=2)
        rare = make_skeleton("a b c", [(0, 1), (1, 2)], dict(left=[0, 1], right=[1, 2], **{str(n): [1] for n in range(30)}), 1)
        with self.assertRaisesRegex(ValueError, "all joints"):  # one of 496 choices, which no single draw would find
            SkeletonMAE(rare, 2, mask_num_parts=2)
        many = make_skeleton([str(n) for n in range(60)], [(0, 1)], {str(n): [n] for n in range(60)}, 0)
        SkeletonMAE(many, 2, mask_num_parts=30)  # 10^17 choices, none of which hides all joints: not tried one by one
        with self.assertRaisesRegex(ValueError, "mse; expected cosine or squared"):
            SkeletonMAE(COCO, 2, loss="mse")
        with self.assertRaisesRegex(ValueError, "one of 8 frames, and there are 4"):
            SkeletonMAE(COCO, 2, strl=dict(persons=1, frames=4, strl_layers=4))


# ---------------------------------------------------------------------------------------------- layers

class LayerTest(Seeded):
    adjacency = normalized_adjacency(STAR["edges"], 5)

    def test_normalized_adjacency(self):
        """D^-1/2 (A + I) D^-1/2 of S Eq. 1, entry by entry, with the degrees counted by hand."""
        degree, expected = [2, 5, 2, 2, 2], torch.zeros(5, 5)
        for i, j in [(0, 1), (1, 2), (1, 3), (1, 4), (0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]:
            expected[i, j] = expected[j, i] = 1 / math.sqrt(degree[i] * degree[j])
        close(self.adjacency, expected)

    def test_adjacency_is_a_buffer(self):
        """The adjacency moves with .to() and is neither trained nor stored; 3 encoder layers and 1 decoder layer hold it (paper 3.1.3)."""
        model = SkeletonMAE(COCO, 2).double()
        self.assertEqual([value.dtype for name, value in model.named_buffers() if "adjacency" in name], [torch.float64] * 4)
        self.assertFalse([name for name in [*model.state_dict(), *dict(model.named_parameters())] if "adjacency" in name])

    def test_compiler(self):
        """torch.compile takes both models whole, for any number of sequences and persons, if it is told who is present
        and what is masked."""
        shape = dict(width=8, hidden=8, layers=1, motion=True, bone=True, dropout=0.0)
        for model in (SkeletonClassifier(STAR, 3, 4, persons=2, frames=8, strl_layers=2, blocks=1, attention_dropout=0.0, **shape),
                      SkeletonMAE(STAR, 3, mask_ratio=0.4, **shape)):
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
            for N in (4, 5, 3):
                x, present = torch.randn(N, 2, 8, 5, 3), torch.tensor([[True, n % 2 == 0] for n in range(N)])
                mask = [model.draw(N, 8)] if isinstance(model, SkeletonMAE) else []
                ours, plain = compiled(x, Packing(present, "cpu"), *mask), model(x, present, *mask)
                close(*((ours[0], plain[0]) if mask else (ours, plain)))

    def test_graph_convolution(self):
        """S Eq. 1 against loops over edges, F.batch_norm, F.prelu: output, gradients, running statistics; finite differences. Both of
        the CPU's way and of a GPU's and the compiler's."""
        for (width_in, width_out), training, torchs in product(((3, 6), (6, 3), (4, 4)), (True, False), (True, False)):
            layer, x = shaken(GraphConvolution(self.adjacency, width_in, width_out)).train(training), torch.randn(5, 2, 3, width_in)
            plain, direction = copy.deepcopy(layer), torch.randn(5, 2, 3, width_out)
            with unittest.mock.patch("torch.compiler.is_compiling", lambda: torchs):
                ours, expected = layer(x.requires_grad_()), plain_graph_layer(plain, x, STAR["edges"], training)
                self.assertEqual("NormPReLU" in str(ours.grad_fn.next_functions) + str(ours.grad_fn), not torchs)
                close(ours, expected)
                close(gradients(layer, x, ours, direction), gradients(plain, x, expected, direction))
                close(statistics(layer), statistics(plain))
                self.assertEqual(layer.norm.num_batches_tracked, int(training))
                x, layer = x.detach().double().requires_grad_(), layer.double()
                self.assertTrue(torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True))

    def test_frozen_batch_norm(self):
        """A batch norm in eval mode inside a layer that trains keeps its statistics and uses them, as torch's own does."""
        layer, x = shaken(GraphConvolution(self.adjacency, 3, 6)).train(), torch.randn(5, 2, 3, 3)
        layer.norm.eval()
        before = copy.deepcopy(statistics(layer))
        close(layer(x), plain_graph_layer(copy.deepcopy(layer), x, STAR["edges"], training=False))
        equal(statistics(layer), before)

    def test_graph_convolution_in_bfloat16(self):
        """Under autocast, output and gradients stay near float32's; rounding flips signs at PReLU's kink, in torch's layers as here."""
        for training in (True, False):
            layer, x = shaken(GraphConvolution(self.adjacency, 8, 8)).train(training), torch.randn(5, 8, 16, 8, requires_grad=True)
            full, direction = layer(x), torch.randn(5, 8, 16, 8)
            with torch.autocast("cpu", torch.bfloat16):
                half = layer(x)
            self.assertEqual(half.dtype, torch.bfloat16)
            for a, b in zip((full, *gradients(layer, x, full, direction)), (half, *gradients(layer, x, half, direction))):
                self.assertLess((a - b.float()).norm() / a.norm(), 0.25)

    def test_batch_norm(self):
        """BatchNorm over (..., D) against nn.BatchNorm1d over (rows, D): both modes, gradients, running statistics."""
        ours, torchs, x = BatchNorm(4), torch.nn.BatchNorm1d(4), (3 * torch.randn(5, 2, 3, 4) + 1).requires_grad_()
        for training in (True, False):
            out, expected = ours.train(training)(x), torchs.train(training)(x.view(-1, 4)).view(x.shape)
            direction = torch.randn_like(out)
            close(out, expected)
            close(gradients(ours, x, out, direction), gradients(torchs, x, expected, direction))
        close(statistics(ours), statistics(torchs))

    def test_dropout(self):
        """S A: feature dropout 0.2, one draw for all frames, mean kept; attention dropout 0.1, on the weights; both off in eval mode."""
        mae, layer = SkeletonMAE(COCO, 2), SkeletonClassifier(COCO, 2, 3).strl.layers[2]
        self.assertEqual((mae.encoder.dropout, layer.encoder.dropout, layer.attention[1].attention.dropout), (0.2, 0.2, 0.1))
        encoder, ones = GraphEncoder(self.adjacency, 8, 8, layers=0), torch.ones(5, 500, 3, 8)
        h = encoder(ones)
        equal(h, h[:, :, :1].expand_as(h))
        self.assertEqual(h.unique().tolist(), [0, 1.25])
        self.assertAlmostEqual(float(h.mean()), 1, delta=0.02)
        for axis in (0, 1, 3):  # drawn apart for each joint, person and channel
            self.assertGreater(h.std(axis).max(), 0)
        equal(encoder.eval()(ones), ones)
        attention, g = shaken(Attention(8, heads=2, dropout=1.0)), torch.randn(3, 5, 8)
        self.assertGreater(attention(g).std((0, 1)).min(), 0)
        equal(attention.train()(g), attention.project.bias.expand(3, 5, 8))

    def test_attention(self):
        """softmax(Q K^T / sqrt(d)) V written out for each person and head; then the pre-norm residual block around it (METHOD)."""
        block, g = shaken(AttentionBlock(8, heads=2, ratio=3)), torch.randn(3, 5, 8)
        close(block.attention(g), torch.stack([plain_attention(block.attention, person) for person in g]))
        close(block(g), torch.stack([plain_attention_block(block, person) for person in g]))
        for heads in (0, 3):
            with self.assertRaisesRegex(ValueError, "do not divide a width of 8"):
                Attention(8, heads=heads)

    def test_temporal_pooling(self):
        """METHOD's four branches (dilation 1 and 2, maximum, identity), frame by frame, for even and odd T."""
        for stride, T in product((1, 2), (1, 6, 7)):
            pool, h = shaken(TemporalPooling(8, stride)), torch.randn(3, 2, T, 8)
            close(pool(h), torch.stack([plain_pooling(pool, h[:, p], stride) for p in range(2)], 1))

    def test_concat_linear(self):
        """Concat(Repeat(g; V), h) W of paper Eq. 3 and 4, with the repeated tokens written to memory."""
        g, h, weight = torch.randn(2, 3, 6), torch.randn(5, 2, 3, 4), torch.randn(7, 10)
        close(concat_linear(g, h, weight), F.linear(torch.cat([g.expand(5, 2, 3, 6), h], -1), weight))

    def test_joint_embedding(self):
        """Joints, motion, bones and score, the mask token, and the joint embedding that masked joints get too (METHOD), by loops."""
        for motion, bone, score in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)):
            embedding = shaken(JointEmbedding(STAR, 2, 8, motion, bone, score))
            x, mask = torch.randn(5, 3, 4, 2 + score), torch.rand(5, 3) < 0.4
            close(embedding(x, mask), plain_embedding(embedding, x, mask))
            close(embedding(x), plain_embedding(embedding, x, mask & False))
            of_frames = torch.rand(5, 3, 4) < 0.4
            close(embedding(x, of_frames), plain_embedding(embedding, x, of_frames))

    def test_masked_joints_have_no_influence(self):
        """METHOD: other coordinates of the masked joints change nothing, not through motion, nor through a visible child's bone."""
        embedding = shaken(JointEmbedding(STAR, 2, 8, motion=True, bone=True, score=True))
        x = torch.randn(5, 3, 4, 3)
        for mask in (torch.tensor([[0, 1, 0, 1, 0]] * 3).T.bool(), torch.rand(5, 3, 4) < 0.4):  # of all frames, and of each frame
            other = torch.where(mask.reshape(5, 3, -1, 1), torch.randn_like(x), x)
            equal(embedding(x, mask), embedding(other, mask))
            self.assertFalse(torch.equal(embedding(x), embedding(other)))

    def test_masking_leaves_statistics_of_bones(self):
        """After pre-training with a mask, an unmasked bone (linear probe) has its usual size: the zeros that hide bones are not data."""
        embedding, x, mask = JointEmbedding(STAR, 2, 8, bone=True), torch.randn(5, 16, 4, 2), torch.tensor([[0, 0, 0, 0, 1]] * 16).T.bool()
        for _ in range(100):
            embedding(x, mask)
        self.assertLess(embedding.eval()(x)[4].norm() / embedding.train()(x)[4].norm(), 2)


# ---------------------------------------------------------------------------------------------- pre-training

class PretrainingTest(Seeded):
    def test_reweighted_cosine_error(self):
        """Paper Eq. 2, (1 - cos)^beta averaged by a loop over the masked joints alone; beta is 2 by default."""
        prediction, target, selected = torch.randn(4, 5, 3), torch.randn(4, 5, 3), torch.rand(4, 5) < 0.5
        for how, beta in ((dict(), 2), (dict(beta=1), 1), (dict(beta=2), 2), (dict(beta=3), 3)):
            errors = []
            for i, j in selected.nonzero().tolist():
                y, x = prediction[i, j].tolist(), target[i, j].tolist()
                errors.append((1 - sum(a * b for a, b in zip(x, y)) / math.hypot(*x) / math.hypot(*y)) ** beta)
            self.assertAlmostEqual(reweighted_cosine_error(prediction, target, selected, **how).item(), sum(errors) / len(errors), places=5)

    def test_degenerate_vectors(self):
        """All-zero vectors have cosine 0 and a finite gradient; an exact prediction and an empty selection cost 0."""
        target, selected = torch.randn(6, 3), torch.ones(6, dtype=torch.bool)
        for beta, (start, expected) in product((1, 2, 3), ((torch.zeros(6, 3), 1), (target, 0), (5 * target, 0), (-target, 2))):
            prediction = start.clone().requires_grad_()
            loss = reweighted_cosine_error(prediction, target, selected, beta)
            self.assertAlmostEqual(loss.item(), expected ** beta, places=5)
            self.assertTrue(torch.autograd.grad(loss, prediction)[0].isfinite().all())
        self.assertEqual(reweighted_cosine_error(target, -target, ~selected), 0)
        self.assertEqual(reweighted_cosine_error(target, 0 * target, selected), 1)

    def test_loss(self):
        """Paper Eq. 2 over the masked joints of persons present, and in the frame at all, whose score is above 0;
        the target is (x/s, y/s, 1) (METHOD)."""
        absent, errors = [(1, 1), (2, 0)], []
        x = people(4, 2, 3, 5, 3, absent)
        x[3, 1, 2, :, :2] = 0
        x[..., 2] = x[..., 2].clamp(min=0)  # half of the scores are 0
        model = shaken(tiny_mae(mask_num_parts=2, score=True, beta=3))
        model.scale.fill_(1.7)
        loss, prediction, mask = model(x)
        self.assertEqual((loss.shape, prediction.shape, mask.shape), ((), (4, 2, 3, 5, 3), (4, 1, 5)))
        for n, m, t, v in product(range(4), range(2), range(3), range(5)):
            if mask[n, 0, v] and (n, m) not in absent and (n, m, t) != (3, 1, 2) and x[n, m, t, v, 2] > 0:
                target, y = torch.tensor([x[n, m, t, v, 0] / 1.7, x[n, m, t, v, 1] / 1.7, 1]), prediction[n, m, t, v]
                errors.append((1 - target @ y / target.norm() / y.norm()) ** 3)
        close(loss, sum(errors) / len(errors))

    def test_weights_do_not_depend_on_the_masking(self):
        """The same seed starts from the same weights, so that masks can be compared."""
        weights = []
        for how in (dict(mask_parts=["left"]), dict(mask_ratio=0.5), dict(mask_num_parts=1)):
            torch.manual_seed(0)
            weights.append(SkeletonMAE(STAR, 2, **SMALL, **how).head.weight)
        self.assertTrue(weights[0].equal(weights[1]) and weights[0].equal(weights[2]))

    def test_features(self):
        """The encoder's features of persons together are those of each alone, zero for who is absent, and carry gradients to the joints."""
        model, x = shaken(tiny_mae(mask_num_parts=2)).eval(), people(3, 2, 4, 5, 2, [(1, 1)]).requires_grad_()
        features = model.features(x)
        self.assertEqual(features.shape, (3, 2, 4, 5, model.decoder.linear.in_features))
        for n, m in product(range(3), range(2)):
            if (n, m) == (1, 1):
                self.assertFalse(features[n, m].any())
            else:
                close(features[n, m], model.features(x[n:n + 1, m:m + 1])[0, 0])
        gradient, = torch.autograd.grad(features[0, 0, 2].square().sum(), x)
        self.assertTrue(gradient[0, 0, 2].any())
        self.assertFalse(gradient[1:].any())

    def test_squared_loss_of_the_stack(self):
        """Ours: the squared distance from (x/s, y/s) over the masked joints of every frame, here of the whole STRL stack with masks of
        their own in each of two segments; every output frame predicts as many frames as the strides skip."""
        strl = dict(persons=2, frames=6, strl_layers=3, blocks=1, heads=2)
        model, x, errors = shaken(tiny_mae(mask_ratio=0.4, loss="squared", mask_segments=2, strl=strl)), people(3, 2, 6, 5, 2, [(1, 1)]), []
        model.scale.fill_(1.7)
        loss, prediction, mask = model(x)
        self.assertEqual((prediction.shape, mask.shape, model.head.out_features), ((3, 2, 6, 5, 3), (3, 6, 5), 4 * 2))
        for n, m, t, v in product(range(3), range(2), range(6), range(5)):
            if mask[n, t, v] and (n, m) != (1, 1):
                errors.append(((x[n, m, t, v] / 1.7 - prediction[n, m, t, v, :2]) ** 2).sum())
        close(loss, sum(errors) / len(errors))
        packing = Packing(torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), "cpu")
        out = model.head(model.decoder(model.encode(packing.pack(x), packing, mask[packing.sequence].permute(2, 0, 1))))
        for t in range(6):
            equal(packing.pack(prediction)[:, :, t, :2], out[:, :, t // 4, 2 * (t % 4):][..., :2])
        coordinates, _ = model.reconstruct(x, mask=mask)
        hidden = mask[:, None, ..., None]
        close(coordinates, torch.where(hidden, 1.7 * prediction[..., :2], x))

    def test_reconstruct(self):
        """A masked joint is s y / max(w, 0.01) in the units of x (METHOD); visible joints stay, absent persons are zero; here with a
        mask that is given. The training mode is kept."""
        model, x, hidden = shaken(tiny_mae()), people(3, 2, 4, 5, 2, absent=[(1, 1)]), torch.tensor([[False, False, True, True, False]] * 3)
        model.scale.fill_(2.5)
        model.head.bias.data[2] -= model(x, mask=hidden)[1][0, ..., [2, 3], 2].mean()  # now w has either sign
        prediction = model(x, mask=hidden)[1]
        self.assertEqual(set(prediction[0, ..., [2, 3], 2].sign().flatten().tolist()), {-1, 1})
        equal(prediction[1, 1], torch.zeros(4, 5, 3))
        expected = x.clone()
        expected[..., [2, 3], :] = 2.5 * prediction[..., [2, 3], :2] / prediction[..., [2, 3], 2:].clamp(min=0.01)
        coordinates, mask = model.train().reconstruct(x, mask=hidden)
        self.assertTrue(model.training and model.encoder.training)
        equal(mask[:, 0], hidden)
        close(coordinates, expected)
        present = torch.tensor([[True, True], [True, False], [True, True]])
        x[1, 1] = float("nan")  # what an absent person's coordinates hold does not matter
        for who in (present, Packing(present, "cpu")):
            close(model.reconstruct(x, who, hidden)[0], expected)
        model.encoder.layers[0].norm.eval()
        self.assertRaises(ValueError, model.reconstruct, x[..., :4, :])
        self.assertRaises(ValueError, model.reconstruct, x, mask=hidden[:2])
        self.assertEqual([name for name, module in model.named_modules() if not module.training], ["encoder.layers.0.norm"])

    def test_absent_persons(self):
        """Three persons in two sequences equal three sequences of one, loss and running statistics (METHOD, Presence); it does not
        matter what an absent person's coordinates hold."""
        model, x = tiny_mae(dropout=0, motion=True), people(2, 2, 4, 5, 2)
        x[1, 1] = float("nan")
        apart = copy.deepcopy(model)
        close(model(x, present=torch.tensor([[True, True], [True, False]]))[0], apart(torch.stack([x[0, 0], x[0, 1], x[1, 0]])[:, None])[0])
        close(statistics(model), statistics(apart))

    def test_learns(self):
        """Every layout, with C, M and the streams varied, trains all parameters; one batch is learned in 60 steps of Adam."""
        for i, layout in enumerate(SKELETONS.values()):
            C, M, score, V = 2 + i % 2, 1 + i // 2 % 2, i % 2, len(layout["joints"])
            model = SkeletonMAE(layout, C, **SMALL, motion=i % 3 == 0, bone=i % 3 == 1, score=bool(score))
            loss, prediction, _ = model(people(2, M, 3, V, C + score).abs())
            loss.backward()
            self.assertEqual(prediction.shape, (2, M, 3, V, C + 1))
            self.assertFalse([name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()])
        model, x, losses = tiny_mae(dropout=0), people(8, 1, 4, 5, 2), []
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        for _ in range(60):
            losses.append(model(x)[0])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        self.assertLess(losses[-1], 0.3 * losses[0])


# ---------------------------------------------------------------------------------------------- fine-tuning

class FinetuningTest(Seeded):
    def test_packing(self):
        """Unpacking undoes packing; swapping gives the other person's rows; the mean is over the persons present (METHOD)."""
        x, present = people(4, 2, 3, 5, 2, absent=[(0, 1), (2, 0)]), torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]]).bool()
        equal(find_present(x, 2), present)
        equal(find_present(0 * x, 2), torch.tensor([[True, False]] * 4))  # the first person always counts
        packing = Packing(present, "cpu")
        packed = packing.pack(x)
        self.assertEqual((packed.shape, packing.pairs), ((5, 6, 3, 2), 2))
        equal(packing.unpack(packed), x)
        equal(packing.unpack(torch.cat([packing.swap(packed[:, :4]), packed[:, 4:]], 1))[[1, 3]], x[[1, 3]].flip(1))
        expected = [sum(x[n, m].flatten() for m in range(2) if present[n, m]) / present[n].sum() for n in range(4)]
        close(packing.mean(packed.permute(1, 2, 0, 3).flatten(1)), torch.stack(expected))
        with self.assertRaisesRegex(ValueError, "sequence 1 "):
            Packing(torch.tensor([[True, False], [False, False]]), "cpu")

    def test_every_parameter_takes_part(self):
        """Whoever is present in a batch, each parameter that is trained gets a gradient: several processes wait for all of them."""
        strl = dict(persons=2, frames=4, strl_layers=2, blocks=1)
        for model, absent in product((tiny_mae(), tiny_mae(strl=strl), tiny_classifier(STAR, 2, 3, persons=2)), ([], [(0, 1), (1, 0)])):
            model.zero_grad()
            out = model(people(2, 2, 4, 5, 2, absent=absent))
            (out[0] if isinstance(model, SkeletonMAE) else out.square().sum()).backward()
            self.assertEqual([name for name, p in model.named_parameters() if p.requires_grad == (p.grad is None)], [])

    def test_second_derivatives_are_refused(self):
        """NormPReLU's backward overwrites what it computes: asking for its own gradient is an error that says so."""
        x = torch.randn(2, 1, 4, 5, 2, requires_grad=True)
        grad, = torch.autograd.grad(tiny_classifier(STAR, 2, 3)(x).sum(), x, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, "once_differentiable"):
            grad.square().sum().backward()

    def test_averaged_weights(self):
        """Torch's update_bn, and an average of all tensors of a state dict, whole numbers too, leave a model that loads and runs."""
        ntu = SKELETONS["ntu25"]
        model = SkeletonMAE(ntu, 3, **SMALL)
        averaged = copy.deepcopy(model)
        for _ in range(50):
            for mine, new in zip(averaged.state_dict().values(), model.state_dict().values()):
                mine.copy_(mine * 0.9 + 0.1 * new)
        tiny_classifier(ntu, 3, 5).load_pretrained(averaged.state_dict())
        torch.optim.swa_utils.update_bn(torch.randn(3, 2, 1, 4, 25, 3), model)
        encoder, means = copy.deepcopy(model.encoder.layers[0]).train(), []
        encoder.norm.reset_running_stats()
        encoder.norm.momentum = None
        for h in torch.randn(3, 25, 2, 4, encoder.linear.in_features):
            encoder(h)
            means.append(encoder.linear(encoder.aggregate(h)).flatten(0, -2).mean(0))
        close(encoder.norm.running_mean, torch.stack(means).mean(0).detach())

    def test_shapes_are_checked(self):
        """Another number of axes, joints, coordinates or persons is a ValueError that names the expected shape."""
        for model, shape in ((tiny_mae(), (2, 4, 5, 2)), (tiny_mae(), (2, 3, 4, 5, 2)), (tiny_mae(), (2, 1, 4, 6, 2)),
                             (tiny_classifier(STAR, 2, 3, persons=2), (2, 1, 4, 5, 2)), (tiny_classifier(STAR, 2, 3), (2, 1, 4, 5, 4)),
                             (tiny_classifier(STAR, 2, 3, score=True), (2, 1, 4, 5, 2)), (LinearProbe(tiny_mae(), 3), (2, 1, 4, 6, 2))):
            with self.assertRaisesRegex(ValueError, r"\(N, M, T, 5, 2"):
                model(torch.randn(shape))
        x, model = torch.randn(3, 2, 4, 5, 2), tiny_mae()
        for shape in ((3, 1), (2, 2)):  # they would pick the wrong persons
            for who in (torch.ones(shape, dtype=torch.bool), Packing(torch.ones(shape, dtype=torch.bool), "cpu")):
                with self.assertRaisesRegex(ValueError, rf"present of shape \(3, 2\), got {re.escape(str(shape))}"):
                    model(x, who)
        with self.assertRaisesRegex(ValueError, "of torch.bool, got torch.int64"):
            model(x, torch.ones(3, 2, dtype=torch.long))
        for mask in (torch.ones(5, 3) > 0, torch.ones(6, 5) > 0, torch.ones(3, 2, 5) > 0, torch.ones(3, 5)):
            with self.assertRaisesRegex(ValueError, r"bool mask \(N, V\) or \(N, 1 or T, V\)"):
                model(x, mask=mask)
        with self.assertRaisesRegex(ValueError, "3 persons a sequence; expected 1 or 2"):
            tiny_classifier(STAR, 2, 3, persons=3)

    def test_equations(self):
        """Paper Eq. 3, paper Eq. 4 and S Eq. 2 through the whole classifier, sequence by sequence with the concatenations written out."""
        x, present = people(4, 2, 6, 5, 2, absent=[(1, 1), (2, 0)]), torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]])
        for stride in (1, 2):
            model = shaken(tiny_classifier(STAR, 2, 3, persons=2, stride=stride, strl_layers=3, frames=4))
            close(model(x), plain_classifier(model, x, present, strides=(stride, stride, 1)))
        model = shaken(tiny_classifier(STAR, 2, 3, persons=1))
        close(model(x[:, :1]), plain_classifier(model, x[:, :1], torch.ones(4, 1), strides=(2, 1)))
        self.assertFalse([name for name, _ in model.named_parameters() if ".other" in name])

    def test_persons_swapped(self):
        """S Eq. 2 treats both persons alike: their order does not change the logits, another partner does."""
        model, x = shaken(tiny_classifier(STAR, 2, 3, persons=2)), people(3, 2, 6, 5, 2)
        close(model(x), model(x.flip(1)))
        self.assertGreater((model(x) - model(torch.stack([x[:, 0], x[:, 1].flip(0)], 1)))[[0, 2]].abs().max(), 1e-2)

    def test_person_absent(self):
        """Without a second person the W_other term is exactly 0, and neither its values nor the rest of the batch matter."""
        model, x = shaken(tiny_classifier(STAR, 2, 3, persons=2)), people(2, 2, 6, 5, 2, absent=[(1, 1)])
        logits, garbage = model(x), x.clone()
        garbage[1, 1] = float("nan")
        equal(model(garbage, torch.tensor([[True, True], [True, False]])), logits)
        close(model(x[1:]), logits[1:])
        for layer in model.strl.layers:
            layer.other.weight.data.mul_(-3)
        equal(model(x)[1], logits[1])
        self.assertGreater((model(x)[0] - logits[0]).abs().max(), 1e-3)

    def test_absent_persons_leave_no_statistics(self):
        """In training, batch norm sees the persons present alone (METHOD): three of them in two sequences leave the statistics of
        three sequences of one. (W_other is 0 here, for it would tell the two batches apart.)"""
        model, x = tiny_classifier(STAR, 2, 3, persons=2, dropout=0, attention_dropout=0), people(2, 2, 6, 5, 2, absent=[(1, 1)])
        for layer in model.strl.layers:
            layer.other.weight.data.zero_()
        apart, nobody = copy.deepcopy(model), torch.zeros(6, 5, 2)
        model(x)
        apart(torch.stack([torch.stack([person, nobody]) for person in (x[0, 0], x[0, 1], x[1, 0])]))
        close(statistics(model), statistics(apart))

    def test_size(self):
        """S A: about 1.5 M parameters, for 60 classes and two persons of 17 joints; 3 STRL layers of 3 graph layers."""
        model = SkeletonClassifier(COCO, 2, classes=60, persons=2, frames=64)
        self.assertAlmostEqual(sum(parameter.numel() for parameter in model.parameters()), 1.5e6, delta=0.1e6)
        self.assertEqual([len(layer.encoder.layers) for layer in model.strl.layers], [3, 3, 3])

    def test_any_input(self):
        """Any layout, T, M, C and streams: float32 logits (N, K), also under autocast; the loss reaches every parameter."""
        for i, layout in enumerate([*SKELETONS.values(), STAR]):
            M, C, score, T, V = 1 + i % 2, 2 + i // 2 % 2, i % 3 == 0, (1, 4, 9)[i % 3], len(layout["joints"])
            model, x = tiny_classifier(layout, C, 4, M, motion=i % 3 == 1, bone=i % 4 == 1, score=score), people(3, M, T, V, C + score)
            F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
            still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
            self.assertEqual(still, {"embedding.mask_token"})  # for pre-training alone
            logits = model.eval()(x)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            self.assertEqual((logits.shape, logits.dtype, half.dtype), ((3, 4), torch.float32, torch.float32))
            self.assertLess((half - logits).norm() / logits.norm(), 0.05)

    def test_own_skeleton(self):
        """A user's skeleton of 5 joints is pre-trained, loaded and fine-tuned: 100 steps tell two classes apart."""
        x, labels = people(16, 2, 6, 5, 2), torch.tensor([0, 1] * 8)
        x[labels == 1, :, 3:, 3] += 2  # the left hand jumps
        mae, model = tiny_mae(), tiny_classifier(STAR, 2, 2, persons=2)
        for network, loss, steps in ((mae, lambda: mae(x)[0], 5), (model, lambda: F.cross_entropy(model(x), labels), 100)):
            optimizer = torch.optim.Adam(network.parameters(), 1e-2)
            for _ in range(steps):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            model.load_pretrained(mae.state_dict()) if network is mae else None
        self.assertGreater((model.eval()(x).argmax(1) == labels).float().mean(), 0.9)

    def test_load_pretrained(self):
        """Embedding and encoder are copied, the encoder into every STRL layer; their names are returned; nothing else changes."""
        mae, model = shaken(tiny_mae()), tiny_classifier(STAR, 2, 3)
        state, before = mae.state_dict(), copy.deepcopy(model.state_dict())
        names = model.load_pretrained(state)
        self.assertCountEqual(names, [name for name in before if name.startswith("embedding.") or ".encoder." in name])
        for name, value in model.state_dict().items():
            equal(value, state[name.split(".", 3)[3] if "strl" in name else name] if name in names else before[name])
        model.strl.layers[0].encoder.layers[0].linear.weight.data.zero_()
        equal(model.strl.layers[1].encoder.layers[0].linear.weight, mae.encoder.layers[0].linear.weight)  # its own copy

    def test_load_pretrained_stack(self):
        """Pre-trained STRL layers are copied as they are, with their temporal position; other blocks or frames do not fit."""
        model = tiny_classifier(STAR, 2, 3)
        mae = shaken(tiny_mae(strl=dict(persons=1, frames=6, strl_layers=2, blocks=1, heads=2, ratio=2)))
        names = model.load_pretrained(mae.state_dict())
        self.assertCountEqual(names, [name for name in model.state_dict() if name.startswith(("embedding.", "strl."))])
        x, packing = torch.randn(5, 3, 6, 2), Packing(torch.ones(3, 1).bool(), "cpu")
        equal(model.eval().strl(model.embedding(x), packing), mae.encode(x, packing))
        for how in (dict(blocks=2), dict(frames=4), dict(strl_layers=3)):
            with self.assertRaisesRegex(ValueError, "does not fit"):
                tiny_classifier(**{"skeleton": STAR, "channels": 2, "classes": 3, **how}).load_pretrained(mae.state_dict())

    def test_load_pretrained_refuses(self):
        """Another width, depth, number of coordinates, number of joints or stream does not fit: ValueError, and nothing is loaded."""
        model = tiny_classifier(STAR, 2, 3)
        before = copy.deepcopy(model.state_dict())
        for how in (dict(width=16), dict(hidden=16), dict(layers=1), dict(layers=3), dict(channels=3), dict(skeleton=COCO),
                    dict(motion=True)):
            mae = SkeletonMAE(**{**SMALL, "skeleton": STAR, "channels": 2, "mask_parts": ["head"], **how})
            with self.assertRaisesRegex(ValueError, "does not fit", msg=how):
                model.load_pretrained(mae.state_dict())
            equal(model.state_dict(), before)

    def test_load_pretrained_refuses_equal_shapes(self):
        """Streams or layouts that differ at equal shapes do not fit either: motion for bones, JHMDB's joints for SBU's."""
        state = SkeletonMAE(SKELETONS["sbu15"], 2, **SMALL, motion=True).state_dict()
        for layout, stream in (("sbu15", "bone"), ("jhmdb15", "motion")):
            with self.assertRaises(ValueError, msg=(layout, stream)):
                tiny_classifier(SKELETONS[layout], 2, 3, **{stream: True}).load_pretrained(state)

    def train_probe(self, mae, probe):
        """One step of the linear probe must leave the encoder as it was, weights and running statistics."""
        before, optimizer = copy.deepcopy(mae.state_dict()), torch.optim.SGD(probe.parameters(), 0.1, weight_decay=0.1)
        F.cross_entropy(probe(people(4, 1, 3, 5, 2)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        equal(mae.state_dict(), before)

    def test_linear_probe_is_frozen(self):
        """Issue 2: the encoder is frozen in training; only the linear layer has gradients."""
        mae = tiny_mae()
        probe = LinearProbe(mae, classes=3).train()
        self.assertEqual([name for name, p in probe.named_parameters() if p.requires_grad], ["head.weight", "head.bias"])
        self.train_probe(mae, probe)

    def test_linear_probe_is_frozen_from_the_start(self):
        """The same without a call of train() before the first step, as a module that was just made is in training mode."""
        mae = tiny_mae()
        self.train_probe(mae, LinearProbe(mae, classes=3))

    def test_linear_probe_features(self):
        """Issue 2: the encoder's output averaged over joints, then mean and maximum over frames; averaged over the persons."""
        mae, x, pooled = shaken(tiny_mae()), people(4, 2, 3, 5, 2, absent=[(1, 1)]), []
        for n, persons in enumerate((2, 1, 2, 2)):
            features = []
            for m in range(persons):
                h = mae.embedding(x[n, m].transpose(0, 1)[:, None])[:, 0]  # (V, T, D)
                for layer in mae.encoder.layers:
                    h = plain_graph_layer(layer, h, STAR["edges"])
                features.append(torch.cat([h.sum((0, 1)) / 15, h.mean(0).amax(0)]))
            pooled.append(sum(features) / len(features))
        close(LinearProbe(mae, classes=3).train().pooled(x), torch.stack(pooled))


class FileTest(unittest.TestCase):
    source = Path(skeletonmae.__file__)

    def test_imports(self):
        """skeletonmae.py imports torch and the standard library, nothing else."""
        names = set()
        for node in ast.walk(ast.parse(self.source.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        self.assertLessEqual({name.split(".")[0] for name in names}, {"torch", *sys.stdlib_module_names})

    def test_copied_alone(self):
        """The file works copied alone into an empty folder, in a fresh Python, and prints no warning."""
        program = ("from skeletonmae import *; model = SkeletonMAE(SKELETONS['coco17'], channels=2); x = torch.randn(2, 1, 4, 17, 2)\n"
                   "classifier = SkeletonClassifier(SKELETONS['coco17'], channels=2, classes=5); model(x)[0].backward()\n"
                   "classifier.load_pretrained(model.state_dict()); print(tuple(classifier(x).shape))")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.source, folder)
            done = subprocess.run([sys.executable, "-E", "-c", program], cwd=folder, capture_output=True, text=True)
        self.assertEqual((done.stdout, done.stderr), ("(2, 5)\n", ""))


# ---------------------------------------------------------------------------------------------- files written byte by byte

class Case(unittest.TestCase):
    """A test with a temporary folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, name: str, content: bytes) -> str:
        path = Path(self.folder, name)
        path.write_bytes(content)
        return str(path)

    def refused(self, path: str, *words: str, **options):
        """data.load raises DataError with a message of one line that holds all words."""
        with self.assertRaises(DataError) as caught:
            data.load(path, **options)
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        for word in words:
            self.assertIn(word, message)

    def same(self, a, b):
        """Equal to the last bit: tensors, and dicts and lists of them."""
        self.assertIs(type(a), type(b))
        if isinstance(a, torch.Tensor):
            self.assertTrue(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        elif isinstance(a, (dict, list, tuple)):
            self.assertEqual(list(a) if isinstance(a, dict) else len(a), list(b) if isinstance(b, dict) else len(b))
            for key in a if isinstance(a, dict) else range(len(a)):
                self.same(a[key], b[key])
        else:
            self.assertEqual(a, b)

    def close(self, a, b, tolerance=1e-5):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def raw(code: str, values: list) -> bytes:
    """Numbers as numpy lays them out in memory."""
    letter = {"f2": "e", "f4": "f", "f8": "d", "i8": "q", "u1": "B", "i2": "h", "b1": "?"}[code[1:]]
    return struct.pack((">" if code[0] == ">" else "<") + str(len(values)) + letter, *values)


def npy(code: str, shape: tuple, values: list, fortran: bool = False, version: int = 1, body: bytes | None = None) -> bytes:
    """A .npy file, written byte by byte; values are in C order, and so reordered for a Fortran file."""
    if fortran:
        index = [sum(i * math.prod(shape[d + 1:]) for d, i in enumerate(place)) for place in
                 ([(n // math.prod(shape[:d])) % shape[d] for d in range(len(shape))] for n in range(math.prod(shape)))]
        values = [values[i] for i in index]
    header = f"{{'descr': '{code}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + (raw(code, values) if body is None else body)


def zipped(compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name + ".npy", content)
    return file.getvalue()


def ctr_gcn(columns: int = 60, code: str = "<f4", compression: int = zipfile.ZIP_STORED, fortran: bool = False, version: int = 1,
            **other: bytes) -> bytes:
    """An npz of 2 + 1 sequences of 3 frames whose value at [n, t, k] is 1 + (3 n + t) columns + k, labels 1, 0 and 1."""
    x = npy(code, (2, 3, columns), [1.0 + i for i in range(6 * columns)], fortran, version)
    entries = dict(x_train=x, y_train=npy("<f8", (2, 2), [0.0, 1, 1, 0]),
                   x_test=npy(code, (1, 3, columns), [1.0 + i for i in range(3 * columns)], fortran, version),
                   y_test=npy("<f8", (1, 2), [0.0, 1]))
    return zipped(compression, **{**entries, **other})


def write_ntu(path: str, sequences: int, test_sequences: int = 60):
    """Random skeletons as a stored npz in the layout of NTU60_CS.npz: 300 frames, two persons of 25 joints,
    the second one mostly absent."""
    draw = torch.Generator().manual_seed(0)

    def numbers(x: torch.Tensor) -> bytearray:
        buffer = bytearray(x.numel() * x.itemsize)
        torch.frombuffer(buffer, dtype=x.dtype).copy_(x.flatten())
        return buffer

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for half, N in (("train", sequences), ("test", test_sequences)):
            with archive.open(f"x_{half}.npy", "w", force_zip64=True) as file:
                file.write(npy("<f4", (N, 300, 150), [], body=b""))
                for first in range(0, N, 128):
                    x = torch.randn(min(128, N - first), 300, 2, 75, generator=draw)
                    x *= torch.arange(300)[:, None, None] < torch.randint(40, 140, (len(x), 1, 1, 1), generator=draw)
                    x[torch.rand(len(x), generator=draw) < 0.75, :, 1] = 0
                    file.write(numbers(x))
            archive.writestr(f"y_{half}.npy", npy("<f8", (N, 60), [], body=numbers(F.one_hot(torch.arange(N) % 60, 60).double())))


class Global:
    """Pickles as the global module.name, whether or not there is such a module."""

    def __init__(self, path: str):
        self.module, self.name = path.rsplit(".", 1)

    def __call__(self):
        raise NotImplementedError


class Made:
    """Pickles as function(*args) and, where there is a state, a BUILD with it."""

    def __init__(self, path: str, *args, state=None):
        self.reduced = (Global(path), args, state)

    def __reduce__(self):
        return self.reduced


class Pickler(pickle._Pickler):
    def save_named(self, made: Global):
        if self.proto >= 4:
            self.save(made.module), self.save(made.name), self.write(pickle.STACK_GLOBAL)
        else:
            self.write(f"c{made.module}\n{made.name}\n".encode())
        self.memoize(made)

    dispatch = {**pickle._Pickler.dispatch, Global: save_named}


def pickled(content, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def dtype(code: str) -> Made:
    """As numpy does it: numpy.dtype("f4", False, True), then a BUILD that sets the byte order."""
    return Made("numpy.dtype", code[1:], False, True, state=(3, code[0], None, None, None, -1, -1, 0))


def rebuilt(*state, core: str = "numpy.core") -> Made:
    """An empty array that BUILD fills: state is shape, dtype, Fortran order, bytes."""
    return Made(f"{core}.multiarray._reconstruct", Global("numpy.ndarray"), (0,), b"b", state=(1, *state) if state else None)


def ndarray(shape: tuple, values: list, kind: Made, core: str = "numpy.core", frombuffer: bool = False) -> Made:
    content = raw(kind.reduced[2][1] + kind.reduced[1][0], values)
    if frombuffer:
        return Made(f"{core}.numeric._frombuffer", pickle.PickleBuffer(bytearray(content)), kind, shape, "C")
    return rebuilt(shape, kind, False, content, core=core)


def pyskl(count: int = 4, persons: int = 1, first_label: int = 0, score=None, **extra) -> list:
    """Annotations "a0", "a1", ... of 2 frames of 13 joints in 2D, whose value number i of annotation n is 10 n + i + 2."""
    f4, size = dtype("<f4"), persons * 2 * 13 * 2
    result = [dict(frame_dir=f"a{n}", label=first_label + n % 2,
                   keypoint=ndarray((persons, 2, 13, 2), [10.0 * n + i + 2 for i in range(size)], f4), **extra)
              for n in range(count)]
    if score is not None:
        result = [{**a, "keypoint_score": ndarray((persons, 2, 13), score, f4)} for a in result]
    return result


def sequences(lengths=(5, 9, 3, 12), persons=2, joints=5, channels=3, seed=0) -> Sequences:
    """Random sequences; the second person of every other one is absent."""
    draw = torch.Generator().manual_seed(seed)
    length, present = torch.tensor(lengths), torch.ones(len(lengths), persons, dtype=torch.bool)
    frames = 3 * torch.randn(sum(lengths), persons, joints, channels, generator=draw) + 20
    start = length.cumsum(0) - length
    for n in range(1, len(lengths), 2):
        present[n, 1:] = False
        frames[start[n]:start[n] + length[n], 1:] = 0
    there, names = present.repeat_interleave(length, 0), [f"s{n}" for n in range(len(lengths))]
    return Sequences(frames, start, length, torch.arange(len(lengths)) % 2, present, there, names)


FIVE = dict(joints=["root", "left_hand", "right_hand", "left_foot", "right_foot"],
            edges=[[0, 1], [0, 2], [0, 3], [0, 4]], centre=[0], pairs=[[1, 2], [3, 4]],
            parts=dict(torso=[0], left_arm=[1], right_arm=[2], left_leg=[3], right_leg=[4]))
TINY_RUN = "--width 8 --hidden 8 --layers 1"
STACK = " --strl-layers 2 --blocks 1 --loss squared --mask-ratio 0.4 --mask-segments 2"


def plain_normalise(x, centre: list, channels: int):
    """One raw sequence (M, T, V, C [+ score]) centred and scaled with loops. Returns (x, origin, unit)."""
    people = [(m, t) for m in range(x.shape[0]) for t in range(x.shape[1]) if x[m, t, :, :channels].any()]
    origin = torch.stack([x[m, t, j, :channels] for m, t in people for j in centre]).mean(0)
    joints = [(m, t, v) for m, t in people for v in range(x.shape[2])]
    seen = [j for j in joints if x.shape[3] == channels or x[j][channels] > 0] or joints
    square = [(x[j][:channels] - origin).square().sum() for j in seen]
    unit, y = torch.stack(square).mean().sqrt(), x.clone()
    for m, t in people:
        y[m, t, :, :channels] = (x[m, t, :, :channels] - origin) / unit
    return y, origin, unit


# ---------------------------------------------------------------------------------------------- readers

class NpzTest(Case):
    def test_every_encoding_gives_the_same_numbers(self):
        """Stored and deflated, C and Fortran order, either byte order, three float types, .npy versions 1 and 2."""
        expected = torch.arange(1.0, 1 + 6 * 60).view(6, 1, 20, 3)
        variants = [dict(code=code, compression=zip_type) for code in ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8") for zip_type in (0, 8)]
        for variant in variants + [dict(fortran=True), dict(fortran=True, code=">f8", compression=8), dict(version=2), dict(version=3)]:
            with self.subTest(**variant):
                loaded = data.load(self.write("a.npz", ctr_gcn(**variant)))
                self.assertTrue(torch.equal(loaded.train.frames.float(), expected))
                self.assertEqual((loaded.layout, loaded.train.label.tolist(), loaded.test.label.tolist(), loaded.classes),
                                 ("kinect20", [1, 0], [1], [0, 1]))

    def test_label_encodings(self):
        """One-hot floats, booleans and integers, and plain integers from 0 or 1 on, a column too; arrays nobody asked for are not read."""
        for y_train, y_test in ((npy("<f8", (2, 2), [0.0, 1, 1, 0]), npy("<f8", (1, 2), [0.0, 1])),
                                (npy("|b1", (2, 2), [0, 1, 1, 0]), npy("|b1", (1, 2), [0, 1])),
                                (npy("<i8", (2, 2), [0, 1, 1, 0]), npy("<i8", (1, 2), [0, 1])),
                                (npy("<i8", (2,), [1, 0]), npy(">i8", (1,), [1])),
                                (npy("<i8", (2, 1), [2, 1]), npy("<i8", (1, 1), [2])),
                                (npy("|u1", (2,), [2, 1]), npy("<i2", (1,), [2]))):
            content = ctr_gcn(y_train=y_train, y_test=y_test, junk=npy("|O", (1,), [], body=b"cos\nsystem\n."), note=b"no array")
            loaded = data.load(self.write("a.npz", content))
            self.assertEqual((loaded.train.label.tolist(), loaded.test.label.tolist(), len(loaded.classes)), ([1, 0], [1], 2))

    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "needs Linux's list of memory maps")
    def test_stored_array_stays_in_the_file(self):
        """The frames of a stored entry lie in the mapping of the file, of a deflated one in memory; writing never reaches the file."""
        for compression, inside in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
            content = ctr_gcn(150, compression=compression)
            path = self.write("a.npz", content)
            frames = data.load(path).train.frames
            with open("/proc/self/maps") as maps:
                spans = [[int(n, 16) for n in line.split()[0].split("-")] for line in maps if path in line]
            self.assertEqual(any(low <= frames.data_ptr() < high for low, high in spans), inside)
            frames.zero_()
            self.assertEqual(Path(path).read_bytes(), content)

    def test_columns_become_persons_joints_coordinates(self):
        """150 columns are two persons of NTU, value m 75 + v 3 + c at [m, v, c]; 60 are Kinect v1; --layout decides."""
        frames = data.load(self.write("a.npz", ctr_gcn(150))).train.frames
        self.assertEqual(frames.shape, (6, 2, 25, 3))
        for f, m, v, c in ((0, 0, 0, 0), (0, 1, 0, 1), (4, 0, 24, 2), (5, 1, 13, 0)):
            self.assertEqual(float(frames[f, m, v, c]), 1 + f * 150 + m * 75 + v * 3 + c)
        path = self.write("b.npz", ctr_gcn(90))
        for columns, layout, wanted, shape in ((60, "kinect20", None, (1, 20, 3)),
                                               (90, "sbu15", None, (2, 15, 3)),
                                               (30, "jhmdb15", None, (1, 15, 2)),
                                               (34, "coco17", None, (1, 17, 2)),
                                               (90, "jhmdb15", "jhmdb15", (2, 15, 3))):
            loaded = data.load(self.write("b.npz", ctr_gcn(columns)), layout=wanted)
            self.assertEqual((loaded.layout, tuple(loaded.train.frames.shape[1:]), loaded.channels), (layout, shape, shape[2]))
        self.refused(path, "coco17", layout="coco17")

    def test_padding_is_cut_and_presence_is_read(self):
        """Trailing zero frames go, zero frames within stay; a person without a number is absent, an empty sequence keeps one frame."""
        x = torch.ones(4, 5, 2, 25, 3)
        x[0, 3:], x[1, 1], x[1, 4], x[2, :, 1], x[2, 2:], x[3] = 0, 0, 0, 0, 0, 0
        x, y = npy("<f4", (4, 5, 150), x.flatten().tolist()), npy("<i8", (4,), [0, 1, 2, 3])
        train = data.load(self.write("a.npz", zipped(x_train=x, y_train=y, x_test=x, y_test=y))).train
        self.assertEqual(train.length.tolist(), [3, 4, 2, 1])
        self.assertEqual(train.start.tolist(), [0, 5, 10, 15])
        self.assertEqual(train.present.tolist(), [[True, True], [True, True], [True, False], [True, False]])

    def test_bad_files_are_refused(self):
        """Every kind of damage is a DataError of one line that names what is wrong."""
        good, deflated = ctr_gcn(), ctr_gcn(compression=8)
        nan = [1.0] * 360
        nan[200] = math.nan
        lie = bytearray(deflated)
        at = lie.index(b"PK\1\2")
        lie[at + 24:at + 28] = struct.pack("<I", 2**31)
        for what, content, words in (
                ("not a zip", b"hello" * 100, ["readable npz"]),
                ("empty file", b"", []),
                ("cut in half", good[:len(good) // 2], ["readable npz"]),
                ("end cut", good[:-30], []),
                ("no x_train", zipped(y_train=b""), ["no x_train", "found y_train"]),
                ("cut npy", ctr_gcn(x_train=npy("<f4", (2, 3, 60), [1.0] * 359)), ["x_train", "truncated"]),
                ("cut deflated npy", ctr_gcn(compression=8, x_train=npy("<f4", (2, 3, 60), [1.0] * 359)), ["x_train", "truncated"]),
                ("cut header", ctr_gcn(x_train=npy("<f4", (2, 3, 60), [])[:40]), ["x_train", "header"]),
                ("no npy", ctr_gcn(x_train=b"x" * 500), ["x_train"]),
                ("objects", ctr_gcn(x_train=npy("|O", (2, 3, 60), [], body=b"\x80\x04N.")), ["x_train", "object"]),
                ("text", ctr_gcn(x_train=npy("<U9", (2, 3, 60), [], body=b"")), ["x_train", "<U9"]),
                ("columns", ctr_gcn(61), ["61 columns", "ntu25"]),
                ("integers", ctr_gcn(x_train=npy("<i8", (2, 3, 60), [1] * 360)), ["x_train", "float"]),
                ("label count", ctr_gcn(y_train=npy("<i8", (3,), [0, 1, 0])), ["y_train", "3 labels", "2 sequences"]),
                ("negative", ctr_gcn(y_train=npy("<i8", (2,), [-1, 0])), ["y_train", "-1"]),
                ("two hot", ctr_gcn(y_train=npy("<f8", (2, 2), [1.0, 1, 0, 1])), ["y_train", "one-hot"]),
                ("part label", ctr_gcn(y_train=npy("<f8", (2,), [0.5, 1])), ["y_train"]),
                ("NaN", ctr_gcn(x_train=npy("<f4", (2, 3, 60), nan)), ["train[1]", "NaN"]),
                ("absurd", ctr_gcn(x_train=npy("<f4", (2, 3, 60), [1e30] * 360)), ["train[0]", "absurd"]),
                ("infinite", ctr_gcn(x_test=npy("<f4", (1, 3, 60), [math.inf] * 180)), ["test[0]", "infinite"]),
                ("empty split", ctr_gcn(x_test=npy("<f4", (0, 3, 60), []), y_test=npy("<i8", (0,), [])), ["x_test"]),
                ("2^60 elements", ctr_gcn(x_train=npy("<f4", (2**60, 3, 60), [1.0])), ["x_train"]),
                ("none of 2^63", ctr_gcn(x_train=npy("<f4", (0, 2**63), [])), ["x_train"]),
                ("deflate lie", bytes(lie), ["claims"]),
                ("other columns", ctr_gcn(x_test=npy("<f4", (1, 3, 150), [1.0] * 450)), ["x_train", "x_test"]),
                ("label without shape", ctr_gcn(y_train=npy("<i8", (), [1])), ["y_train"]),
                ("infinite label", ctr_gcn(y_train=npy("<f8", (2,), [math.inf, 0])), ["y_train"]),
                ("huge label", ctr_gcn(y_train=npy("<i8", (2,), [2**62, 0])), []),
                ("damaged LZMA", ctr_gcn(compression=14).replace(b"\x5d\0\0\x80\0", b"\xff" * 5), [])):
            with self.subTest(what):
                self.refused(self.write("a.npz", content), *words)
        with self.assertRaises(OSError):
            data.load(os.path.join(self.folder, "absent.npz"))
        self.refused(self.write("a.txt", b"x"), ".npz")


class PickleTest(Case):
    def test_every_encoding_gives_the_same_numbers(self):
        """Protocols 2 to 5, both numpy module names, _frombuffer, scalar labels; one dtype object is shared by all arrays."""
        for protocol in (2, 3, 4, 5):
            for core in ("numpy.core", "numpy._core"):
                for frombuffer in (False, True)[:1 + (protocol == 5)]:
                    with self.subTest(protocol=protocol, core=core, frombuffer=frombuffer):
                        f4, i8, size = dtype("<f4"), dtype("<i8"), (480, 854)
                        annotations = [dict(frame_dir=f"a{n}", label=Made(f"{core}.multiarray.scalar", i8, raw("<i8", [n + 1])),
                                            img_shape=size, original_shape=size, total_frames=2,
                                            keypoint=ndarray((1, 2, 13, 2), [float(100 * n + i + 2) for i in range(52)],
                                                             f4, core, frombuffer),
                                            keypoint_score=ndarray((1, 2, 13), [0.5] * 26, f4, core, frombuffer))
                                       for n in range(3)]
                        content = pickled({"split": {"train": ["a0", "a2"], "val": ["a1"]}, "annotations": annotations}, protocol)
                        self.assertEqual(b"_codecs" in content, protocol == 2)
                        loaded = data.load(self.write("a.pkl", content))
                        self.assertEqual(loaded.train.frames.shape, (6, 1, 13, 3))
                        self.assertEqual(loaded.train.frames[..., :2].flatten().tolist(),
                                         [float(100 * n + i + 2) for n in range(3) for i in range(52)])
                        self.assertTrue((loaded.train.frames[..., 2] == 0.5).all() and loaded.score)
                        self.assertEqual((loaded.train.start.tolist(), loaded.train.label.tolist(),
                                          loaded.test.label.tolist(), loaded.classes), ([0, 4], [0, 2], [1], [1, 2, 3]))

    def test_array_dtypes(self):
        """Half, double and big-endian coordinates, integer and boolean arrays, Fortran order."""
        for code, values in (("<f2", [0.5, -2.0]),
                             (">f4", [0.5, 1e9]),
                             ("<f8", [0.1, -3.0]),
                             ("<i2", [-300, 7]),
                             ("|u1", [255, 3]),
                             ("|b1", [True, False])):
            loaded = data.read_pickle(self.write("a.pkl", pickled(ndarray((2,), values, dtype(code)))))
            self.assertEqual(loaded.tolist(), torch.tensor(values, dtype=loaded.dtype).tolist())
            self.assertEqual(loaded.dtype.itemsize, int(code[2:]))
        fortran = rebuilt((2, 3), dtype("<f4"), True, raw("<f4", [1, 4, 2, 5, 3, 6]))
        self.assertEqual(data.read_pickle(self.write("a.pkl", pickled(fortran))).tolist(), [[1, 2, 3], [4, 5, 6]])

    def test_bare_list_is_split_by_fraction(self):
        """Without `split` test_fraction of the annotations are for testing, always the same, none in both halves."""
        path = self.write("a.pkl", pickled(pyskl(20, first_label=1)))
        halves = [data.load(path, test_fraction=0.3) for _ in range(2)]
        self.assertEqual((len(halves[0].train), len(halves[0].test), halves[0].score, halves[0].classes), (14, 6, False, [1, 2]))
        self.assertEqual(sorted(halves[0].train.names + halves[0].test.names), sorted(f"a{n}" for n in range(20)))
        self.assertEqual(halves[0].test.names, halves[1].test.names)
        more = data.load(self.write("more.pkl", pickled(pyskl(23))), test_fraction=0.3)  # what came later moves one at most
        self.assertLessEqual(len({*halves[0].test.names} & {*more.train.names}) + len({*halves[0].train.names} & {*more.test.names}), 1)
        self.assertNotIn(sorted(halves[0].test.names), [sorted(f"a{n}" for n in part) for part in (range(6), range(14, 20))])
        self.refused(path, "xsub", split="xsub")
        self.refused(self.write("a.pkl", pickled(pyskl(1))), "a.pkl")

    def test_padding_is_cut(self):
        """Frames of zeros at the end go, whether they have scores or not; those within a sequence stay."""
        keypoint, f4 = [2.0] * 26 + [0.0] * 26 + [2.0] * 26 + [0.0] * 52, dtype("<f4")
        padded = {**pyskl(1)[0], "frame_dir": "padded", "keypoint": ndarray((1, 5, 13, 2), keypoint, f4)}
        scored = {**padded, "frame_dir": "scored", "keypoint_score": ndarray((1, 5, 13), [0.5] * 65, f4)}
        for annotations in ([padded], [scored], [padded, scored]):
            content = {"annotations": annotations, "split": {half: [a["frame_dir"] for a in annotations] for half in ("train", "test")}}
            train = data.load(self.write("a.pkl", pickled(content))).train
            self.assertEqual(train.length.tolist(), [3] * len(annotations))
            self.assertEqual(train.frames[:3, 0, 0, 0].tolist(), [2, 0, 2])
        two = {**pyskl(1)[0], "keypoint": ndarray((2, 3, 13, 2), [2.0] * 26 + [0.0] * 52 + [2.0] * 52 + [0.0] * 26, f4),
               "keypoint_score": ndarray((2, 3, 13), [0.5] * 78, f4)}
        train = data.load(self.write("a.pkl", pickled({"annotations": [two], "split": {"train": ["a0"], "test": ["a0"]}}))).train
        self.assertEqual((train.length.tolist(), train.there.tolist()), ([2], [[True, True], [False, True]]))

    def test_names_of_a_split(self):
        """As PYSKL reads it: every annotation of a listed name, once; names of none are passed over and counted."""
        annotations = pyskl(4)
        annotations[3]["frame_dir"] = "a0"
        content = {"annotations": annotations, "split": {"train": ["a2", "a0", "a2", "gone"], "test": ["a1"]}}
        loaded = data.load(self.write("a.pkl", pickled(content)))
        self.assertEqual(loaded.train.names, ["a2", "a0", "a0"])
        self.assertEqual(loaded.split, "train / test, 1 of their names without an annotation")
        content["split"] = {"train": ["a2", "a1"], "test": ["a1", "a0", "a2"]}
        self.assertEqual(data.load(self.write("a.pkl", pickled(content))).split, "train / test, 2 of their names in both")

    def test_two_persons_are_kept(self):
        """Of up to four persons the two of the highest mean score stay, in their order; without scores the two that move most."""
        score = [s for person in (0.2, 0.6, 0.1, 0.9) for s in [person] * 26]
        scored = data.load(self.write("a.pkl", pickled(pyskl(2, 4, score=score)))).train.frames
        self.assertEqual(scored.shape, (4, 2, 13, 3))
        self.close(scored[0, :, 0, 2], [0.6, 0.9])
        still = [m * 1000.0 + t * 26 * (0, 3, 1, 2)[m] + i + 2 for m in range(4) for t in range(2) for i in range(26)]
        annotations = [{**a, "keypoint": ndarray((4, 2, 13, 2), still, dtype("<f4"))} for a in pyskl(2)]
        self.assertEqual(data.load(self.write("a.pkl", pickled(annotations))).train.frames[0, :, 0, 0].tolist(), [1002.0, 3002.0])
        for persons in (1, 2, 3):
            self.assertEqual(data.load(self.write("a.pkl", pickled(pyskl(2, persons)))).persons, min(persons, 2))
        flicker = [2.0 + t for m in range(2) for t in range(6) for _ in range(26)] + [99.0 * (t == 3) for t in range(6) for _ in range(26)]
        annotations = [{**a, "keypoint": ndarray((3, 6, 13, 2), flicker, dtype("<f4"))} for a in pyskl(2)]
        train = data.load(self.write("a.pkl", pickled(annotations))).train
        self.assertEqual(train.frames[:6, :, 0, 0].tolist(), [[2.0 + t] * 2 for t in range(6)])  # who comes and goes has not moved
        for who in product(("moves", "stays", "once", "nowhere"), repeat=3):  # and whoever is there goes before an empty place
            moves = {"moves": [t + 2.0 for t in range(6)], "stays": [2.0] * 6, "once": [0.0, 0, 9, 0, 0, 0], "nowhere": [0.0] * 6}
            values = [value for name in who for value in moves[name] for _ in range(26)]
            kept = data.read_annotation({"keypoint": torch.tensor(values).view(3, 6, 13, 2)}, False, "a")
            self.assertEqual(int(kept.flatten(2).any(2).any(0).sum()), min(2, 3 - who.count("nowhere")), who)

    def test_nobody_there(self):
        """A person of zero coordinates, or of zero score throughout, is absent, in a file where other annotations have scores too."""
        annotations = pyskl(3, 2, score=[0.5] * 26 + [0.0] * 26)
        zeros = dict(frame_dir="zeros", label=0, keypoint=ndarray((2, 2, 13, 2), [3.0] * 52 + [0.0] * 52, dtype("<f4")))
        content = {"annotations": annotations + [zeros], "split": {"train": ["a0", "zeros"], "test": ["a1"]}}
        loaded = data.load(self.write("a.pkl", pickled(content)))
        self.assertNotIn("without anyone", str(loaded))
        nobody = [dict(frame_dir=f"b{n}", label=0, keypoint=ndarray((1, 2, 13, 2), [0.0] * 52, dtype("<f4"))) for n in range(3)]
        content |= {"annotations": content["annotations"] + nobody,
                    "split": {"train": ["a0", "zeros", "b0"], "test": ["b1", "a1", "b2"]}}
        self.assertIn("2 frames, 3 sequences without anyone", str(data.load(self.write("b.pkl", pickled(content)))))
        self.assertEqual(loaded.train.present.tolist(), [[True, False], [True, False]])
        self.assertFalse(loaded.train.frames[:2, 1].any())

    def test_find_split(self):
        """The obvious pair is found, a named one is taken, anything else lists what the file has."""
        ntu, folds = ["xsub_train", "xsub_val", "xview_train", "xview_val"], ["f1_train", "f1_test", "f2_train", "f2_test"]
        for present, wanted, expected in ((ntu, None, ("xsub_train", "xsub_val")),
                                          (ntu, "xview", ("xview_train", "xview_val")),
                                          (ntu, "xview_val", ("xview_train", "xview_val")),
                                          (["val", "train", "test"], None, ("train", "val")),
                                          (["test", "train", "validation_train", "validation_test"], None, ("train", "test")),
                                          (folds[:2], None, ("f1_train", "f1_test")),
                                          (folds, "f2", ("f2_train", "f2_test")),
                                          (folds, "f2_test, f1_train", ("f2_test", "f1_train"))):
            self.assertEqual(data.find_split(present, wanted, "file"), expected)
        for present, wanted in ((folds, None), (ntu, "xset"), (folds, "f1_train,f9_test"), (["all"], None)):
            with self.assertRaises(DataError) as caught:
                data.find_split(present, wanted, "file")
            self.assertTrue(all(name in str(caught.exception) for name in present))

    def test_bad_content_is_refused(self):
        """Wrong types, shapes, labels and splits; numbers, nesting and cycles no honest file holds."""
        def one(**change):
            return [*pyskl(2), {**pyskl(1)[0], "frame_dir": "bad", **change}]

        f4, deep, cycle = dtype("<f4"), [], []
        cycle.append(cycle)
        for _ in range(300):
            deep = [deep]
        deepest = b"(" * 200_000 + b"t" * 200_000
        label = pickled(one(label="hole"), 2).replace(b"X\4\0\0\0hole", deepest)
        name = pickled(one(), 2).replace(b"X\3\0\0\0bad", deepest)
        for what, content, words in (
                ("number", 3, ["int"]),
                ("empty", [], []),
                ("no annotations", {"split": {}}, ["annotations"]),
                ("keypoint is a list", one(keypoint=[1.0]), ["bad", "keypoint", "list"]),
                ("never filled", one(keypoint=rebuilt()), ["bad", "keypoint"]),
                ("shape", one(keypoint=ndarray((2, 13, 2), [1.0] * 52, f4)), ["bad", "(2, 13, 2)"]),
                ("frames first", one(keypoint=ndarray((31, 1, 13, 2), [1.0] * 806, f4)), ["bad", "(31, 1, 13, 2)", "before frames"]),
                ("joints", one(keypoint=ndarray((1, 2, 14, 2), [1.0] * 56, f4)), ["bad", "14"]),
                ("score", one(keypoint_score=ndarray((1, 1, 13), [1.0] * 13, f4)), ["bad", "keypoint_score"]),
                ("NaN", one(keypoint=ndarray((1, 2, 13, 2), [math.nan] * 52, f4)), ["bad", "NaN"]),
                ("NaN score", one(keypoint_score=ndarray((1, 2, 13), [math.nan] * 26, f4)), ["bad", "NaN", "scores"]),
                ("label text", one(label="run"), ["bad", "str"]),
                ("a set", pickle.dumps({1, 2}, 4), ["set", "expected arrays"]),
                ("a frozen set", pickle.dumps(frozenset([1, 2]), 4), ["set", "expected arrays"]),
                ("label below 0", one(label=-1), ["bad", "-1"]),
                ("label 10^30", one(label=10**30), ["bad"]),
                ("label 2^62", one(label=2**62), []),
                ("cycle", one(label=cycle), ["bad", "label"]),
                ("deep", one(label=deep), ["bad", "label"]),
                ("deepest label", label, []),
                ("deepest name", name, []),
                ("objects", one(keypoint=rebuilt((1,), dtype("|O8"), False, [1])), ["O8", "numbers"]),
                ("empty half", {"annotations": pyskl(), "split": {"train": ["a0"], "val": []}}, ["val", "empty"]),
                ("absent names", {"annotations": pyskl(), "split": {"train": ["a0"], "val": ["b"]}}, ["val"]),
                ("no split dict", {"annotations": pyskl(), "split": [1]}, ["split"]),
                ("frames for persons", one(keypoint=ndarray((6, 1, 13, 2), [1.0] * 156, f4)), ["(6, 1, 13, 2)", "persons before frames"]),
                ("cut", pickled(pyskl())[:-40], []),
                ("2^60 bytes", b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", []),
                ("2^60 elements", one(keypoint=rebuilt((2**60, 2, 13, 2), f4, False, b"1234")), ["needs"]),
                ("a memo that holds itself", b"\x80\x04]\x94(h\x00e.", []),
                ("list of a cycle", b"\x80\x04}\x94X\x0b\0\0\0annotationsh\x00s.", ["annotations"])):
            with self.subTest(what):
                self.refused(self.write("a.pkl", content if isinstance(content, bytes) else pickled(content)), *words)
        numbered = self.write("a.pkl", pickled({"annotations": pyskl(), "split": {1: ["a0"], 2: ["a1"], 0.5: []}}))
        self.assertEqual(data.load(numbered, split="1,2").split, "1 / 2")

    def test_a_large_memo_index_costs_no_memory(self):
        """One flipped byte of a PUT must not make the reader set up a memo of millions of entries."""
        path = self.write("a.pkl", b"\x80\x02]r" + struct.pack("<I", 2**22) + b".")
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.refused(path)
        self.assertLess(tracemalloc.get_traced_memory()[1], 10e6)


class HostilePickleTest(Case):
    def test_nothing_runs_and_the_global_is_named(self):
        """Payloads that would leave a file: none does, each is a DataError, and those with a foreign global name it."""
        marker = os.path.join(self.folder, "ran")
        command, text = f"touch {marker}", f"S'touch {marker}'\n".encode()
        code = f"open({marker!r}, 'w')"
        allowed = b"cnumpy.core.multiarray\n_reconstruct\n"
        copyreg.add_extension("os", "system", 240)
        self.addCleanup(copyreg.remove_extension, "os", "system", 240)
        nested = [dict(frame_dir="a", label=Made("os.system", command))]
        payloads = [  # (what, pickle, global named in the message)
            ("REDUCE", b"cos\nsystem\n(" + text + b"tR.", "os.system"),
            ("posix", b"cposix\nsystem\n(" + text + b"tR.", "posix.system"),
            ("INST", b"(" + text + b"ios\nsystem\n.", "os.system"),
            ("OBJ", b"(cos\nsystem\n" + text + b"o.", "os.system"),
            ("NEWOBJ", b"\x80\x02cos\nsystem\n(" + text + b"t\x81.", "os.system"),
            ("NEWOBJ_EX", b"\x80\x04cos\nsystem\n(" + text + b"t}\x92.", "os.system"),
            ("EXT1", b"\x80\x02\x82\xf0(" + text + b"tR.", "os.system"),
            ("EXT2", b"\x80\x02\x83\xf0\0(" + text + b"tR.", "os.system"),
            ("EXT4", b"\x80\x02\x84\xf0\0\0\0(" + text + b"tR.", "os.system"),
            ("deep in the data", pickled(nested), "os.system"),
            ("in a dict's key", pickled({Made("os.system", command): 1}, 2), "os.system"),
            *((path, pickled(Made(path, *args), protocol), path) for protocol, path, args in (
                (4, "builtins.eval", [code]),
                (2, "__builtin__.eval", [code]),
                (4, "builtins.exec", [code]),
                (5, "subprocess.Popen", [command]),
                (4, "runpy.run_path", [marker]),
                (4, "builtins.getattr", [Global("os.system"), "__call__"]),
                (4, "importlib.import_module", ["os"]),
                (4, "operator.attrgetter", ["system"]),
                (4, "functools.partial", [command]),
                (4, "numpy.load", [marker, None, True]),
                (4, "numpy.fromfile", [marker]),
                (2, "numpy.core.multiarray.fromfile", [marker]),
                (4, "numpy.memmap", [marker]),
                (4, "numpy.core.numeric.load", [marker]),
                (4, "numpy.f2py.capi_maps.getinit", [code]),
                (4, "numpy.testing._private.utils.runstring", [code, {}]),
                (4, "builtins.open", [marker, "w"]),
                (4, "torch.load", [marker]),
                (4, "pickle.loads", [b"."]),
                (4, "copyreg._reconstructor", []),
                (4, "_codecs.decode", [b"x"]),
                (4, "data._Call", [code]))),
            ("dotted name", b"\x80\x04\x8c\x05numpy\x8c\x1cndarray.__init__.__globals__\x93.", "numpy.ndarray.__init__"),
            ("attribute of an allowed function", b"\x80\x04\x8c\x07_codecs\x8c\x0fencode.__self__\x93.", "encode.__self__"),
            ("encoding", pickled(Made("_codecs.encode", "x", "rot13")), "encoding"),
            ("text in no array", pickled(Made("_codecs.encode", b"x", "latin1")), "encoding"),
            ("persistent id", b"\x80\x02K\1Q.", ""),
            ("persistent id, text", b"Pid\n.", ""),
            ("BUILD on a function", allowed + b"}S'function'\ncos\nsystem\nsb.", "os.system"),
            ("dict state on a function", allowed + b"}S'function'\nNsb.", "function"),
            ("slot state on a function", allowed + b"N}S'function'\nNs\x86b.", "function"),
            ("BUILD on a class", b"cnumpy\ndtype\n}S'__init__'\nNsb.", ""),
            ("slot state on a class", b"cnumpy\nndarray\nN}S'__setstate__'\nNs\x86b.", ""),
            ("slot state on an array", allowed + b"(tRN}S'tensor'\nNs\x86b.", ""),
            ("slot state on a dtype", b"cnumpy\ndtype\n(S'f4'\ntRN}S'code'\nS'f8'\ns\x86b.", ""),
            ("a function as dtype", pickled(ndarray((1,), [1.0], dtype("<f4"))).replace(b"\x8c\x05dtype", b"\x8c\x07ndarray"), ""),
            ("scalar of objects", pickled(Made("numpy.core.multiarray.scalar", dtype("|O8"), b"cos\nsystem\n.")), "O8"),
            ("class called as data", b"cnumpy\nndarray\n(" + text + b"tR.", "")]
        for _, content, _ in payloads[:4]:  # they do run where a plain unpickler reads them
            pickle.loads(content)
            os.remove(marker)
        for what, content, word in payloads:
            with self.subTest(what):
                self.refused(self.write("a.pkl", content), word)
                self.assertFalse(os.path.exists(marker))
        self.assertEqual(len(data.load(self.write("a.pkl", pickled(pyskl()))).train), 3)  # the reader is unharmed


class PtTest(Case):
    def test_round_trip(self):
        """Lists of tensors of any T and M come back frame by frame; a missing second person is absent."""
        draw, content = torch.Generator().manual_seed(0), {}
        shapes = dict(train=[(4, 1, 17, 2), (6, 2, 17, 2), (1, 1, 17, 2)], test=[(3, 1, 17, 2)])
        for half, wanted in shapes.items():
            content |= {f"x_{half}": [torch.randn(s, generator=draw, dtype=torch.float64) for s in wanted],
                        f"y_{half}": [n + 3 for n in range(len(wanted))]}
        path = Path(self.folder, "a.pt")
        torch.save(content, path)
        loaded = data.load(path)
        self.assertEqual((loaded.layout, loaded.persons, loaded.classes, loaded.train.label.tolist()), ("coco17", 2, [3, 4, 5], [0, 1, 2]))
        for half, part in (("train", loaded.train), ("test", loaded.test)):
            for n, x in enumerate(content[f"x_{half}"]):
                frames = part.frames[part.start[n]:part.start[n] + part.length[n]]
                self.assertTrue(torch.equal(frames[:, :x.shape[1]], x.float()))
                self.assertFalse(frames[:, x.shape[1]:].any())
                self.assertEqual(part.present[n].tolist(), [True, x.shape[1] == 2])

    def test_tensors_with_gradients(self):
        """What a model put out, and still asks for gradients, is data as well."""
        x, path = torch.ones(2, 4, 1, 17, 2), os.path.join(self.folder, "a.pt")
        torch.save(dict(x_train=[frames.clone().requires_grad_() for frames in x], y_train=[0, 1], x_test=x, y_test=[0, 1]), path)
        self.assertFalse(data.load(path).train.frames.requires_grad)

    def test_bad_files_are_refused(self):
        """Nothing but plain tensors is loaded, and their shapes are checked."""
        x, y, long = torch.ones(2, 4, 1, 17, 2), [0, 1], torch.ones(3000, 1, 17, 2)
        good = dict(x_train=x, y_train=y, x_test=x, y_test=y)
        for what, content, words in (("a module", torch.nn.Linear(1, 1), ["tensors"]),
                                     ("a list", [x], ["x_train"]),
                                     ("no test", dict(x_train=x, y_train=y), ["x_test"]),
                                     ("empty", good | {"x_test": []}, ["x_test"]),
                                     ("rank", good | {"x_train": x[0]}, ["x_train[0]", "(1, 17, 2)"]),
                                     ("three persons", good | {"x_train": torch.ones(2, 4, 3, 17, 2)}, ["x_train[0]"]),
                                     ("joints differ", good | {"x_train": [x[0], torch.ones(4, 1, 13, 2)]}, ["x_train[1]", "13"]),
                                     ("labels", good | {"y_train": [0]}, ["y_train", "1 labels"]),
                                     ("halves differ", good | {"x_test": torch.ones(2, 4, 1, 13, 2)}, ["x_test"]),
                                     ("complex", good | {"x_test": x.to(torch.complex64)}, ["x_test[0]", "complex"]),
                                     ("infinite", good | {"x_test": x / 0}, ["test[0]", "infinite"]),
                                     ("all zero", good | {"x_train": 0 * x}, ["zero", "expected skeletons"]),
                                     ("overlapping windows", good | {"x_train": [long[i:i + 64] for i in range(2900)]}, ["clone()"]),
                                     ("no memory", good | {"x_train": x.to("meta")}, ["_rebuild_meta_tensor"]),
                                     ("a number", good | {"x_train": 3}, ["x_train"]),
                                     ("a dict", good | {"x_train": {"a": x}}, ["x_train"]),
                                     ("label text", good | {"y_train": "ab"}, ["y_train"]),
                                     ("a label list", good | {"y_train": [[0], [1, 2]]}, ["y_train"])):
            with self.subTest(what):
                path = os.path.join(self.folder, "a.pt")
                torch.save(content, path)
                self.refused(path, *words)
        self.refused(self.write("a.pt", pickled(Made("os.system", "true"))), "a.pt")
        self.refused(self.write("a.pt", b""), "a.pt")

    def test_boxed_data_are_not_turned(self):
        path = os.path.join(self.folder, "a.pt")
        torch.save(dict(x_train=torch.randn(2, 4, 1, 20, 3), y_train=[0, 1], x_test=torch.randn(1, 4, 1, 20, 3), y_test=[0]), path)
        for box in (False, True):
            train = data.load(path, box=box).train
            linear, _, unit = train.placement
            self.assertEqual((train.box, torch.allclose(linear * unit[:, None, None], torch.eye(3))), (box, box))

    def test_own_layout(self):
        """A JSON file is a layout; a bad one, an unknown name and the wrong number of joints are refused."""
        path, layout = os.path.join(self.folder, "a.pt"), self.write("five.json", json.dumps(FIVE).encode())
        torch.save(dict(x_train=torch.ones(2, 4, 1, 5, 3), y_train=[0, 1], x_test=torch.ones(1, 4, 1, 5, 3), y_test=[0]), path)
        self.assertEqual(data.load(path, layout=layout).skeleton, FIVE)
        self.refused(path, "5 joints", "--layout")
        self.refused(path, "coco18", layout="coco18")
        self.refused(path, "--split xsub", split="xsub")
        self.refused(path, "17", layout="coco17")
        for bad in (b"[", b"[1]", b'{"joints": "a"}', json.dumps(FIVE | {"edges": [[0, 9]]}).encode()):
            self.refused(path, "five.json", layout=self.write("five.json", bad))


# ---------------------------------------------------------------------------------------------- batches

class BatchTest(Case):
    def test_flatten(self):
        """Sequences follow each other without their trailing zero frames; T and M may differ."""
        parts = [torch.randn(4, 1, 5, 3), torch.randn(6, 2, 5, 3), torch.randn(2, 2, 5, 3)]
        parts[1][4:], parts[2][:, 1] = 0, 0
        flat = data.flatten(parts, torch.tensor([0, 1, 0]), ["a", "b", "c"], "file")
        self.assertEqual((flat.start.tolist(), flat.length.tolist(), flat.present.tolist()),
                         ([0, 4, 8], [4, 4, 2], [[True, False], [True, True], [True, False]]))
        self.assertTrue(torch.equal(flat.frames[:4, :1], parts[0]) and torch.equal(flat.frames[4:8], parts[1][:4])
                        and torch.equal(flat.frames[8:], parts[2]))
        self.assertFalse(flat.frames[:4, 1].any())
        self.assertEqual(flat.subset([2, 0]).names, ["c", "a"])
        self.assertEqual(flat.subset(flat.label == 0).names, ["a", "c"])

    def test_sample_frames_against_segments(self):
        """Testing takes the middle of each of T segments; training any frame of each, and only those; short sequences repeat."""
        T, lengths = 8, [1, 3, 8, 20, 77]
        middle = [[int((t + 0.5) / T * L) for t in range(T)] for L in lengths]
        self.assertEqual(data.sample_frames(torch.tensor(lengths), T, False, crop=0.5).tolist(), middle)
        generator = torch.Generator().manual_seed(0)
        drawn = data.sample_frames(torch.tensor(lengths * 400), T, True, generator=generator).view(400, len(lengths), T)
        for i, L in enumerate(lengths):
            for t in range(T):
                self.assertEqual(set(drawn[:, i, t].tolist()), set(range(math.floor(t * L / T), math.ceil((t + 1) * L / T))))

    def test_crop_is_a_random_window(self):
        """With crop 0.5 the frames fill a window of half to all of the sequence that begins anywhere, and stay in range."""
        drawn = data.sample_frames(torch.full((2000,), 1000), 100, True, 0.5, torch.Generator().manual_seed(0))
        first, span = drawn[:, 0], (drawn[:, -1] - drawn[:, 0]) / 1000
        self.assertTrue((drawn.diff(dim=1) >= 0).all() and drawn.min() >= 0 and drawn.max() <= 999)
        self.assertTrue(0.48 < span.min() < 0.52 and 0.97 < span.max() <= 1 and first.max() > 400)

    def test_normalise_against_loops(self):
        """Origin: the centre joints over persons and frames; unit: the RMS distance of seen joints; zeros stay; it can be undone."""
        for C, score in ((3, False), (2, False), (2, True)):
            skeleton = FIVE | {"centre": [0, 3]}
            x = 5 * torch.randn(4, 2, 6, 5, C + score, generator=torch.Generator().manual_seed(C)) + 30
            x[1, 1], x[2, :, 3], x[3] = 0, 0, 0
            if score:
                x[..., C] = (x[..., C] > 30).float()
                x[0, ..., C] = 0
            seen = x.clone()
            if score:
                seen[2, :, 3, :, :C] = x[2, :, 2, :, :C]  # nobody saw them, so they are where they were
            y, origin, unit = data.normalise(x, skeleton, C)
            self.close(data.normalise(x.double(), skeleton, C)[0].float(), y, 1e-4)
            for n in range(3):
                expected, centre, size = plain_normalise(seen[n], [0, 3], C)
                self.close(y[n], expected), self.close(origin[n].flatten(), centre), self.close(float(unit[n]), float(size))
            self.assertFalse(y[1, 1, ..., :C].any() or y[3, ..., :C].any())
            self.assertEqual(bool(y[2, :, 3, :, :C].any()), score)
            self.close((y[0, ..., :C] * unit[0] + origin[0]), x[0, ..., :C], 1e-4)
            if score:
                self.assertTrue(torch.equal(y[..., C], x[..., C]))

    def test_three_dimensions_face_the_viewer(self):
        """However a 3D sequence is turned about the vertical, it comes out the same: shoulders and hips along x,
        left at larger x, heights kept."""
        x, skeleton = torch.randn(1, 2, 6, 20, 3, generator=torch.Generator().manual_seed(3)) + 4, SKELETONS["kinect20"]
        y, origin, unit = data.normalise(x, skeleton, 3)
        for angle in (0.7, 2.5, -1.9):
            matrix = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
            self.close(data.normalise(x @ matrix.T, skeleton, 3)[0], y, 1e-4)
        self.close(data.normalise(x.flip(1) * torch.tensor([0, 1]).view(1, 2, 1, 1, 1), skeleton, 3)[0][:, 1],  # alone in the second place
                   data.normalise(x[:, :1], skeleton, 3)[0][:, 0], 1e-4)
        across = sum(y[0, 0, :, left] - y[0, 0, :, right] for left, right in ((4, 8), (12, 16))).mean(0)
        self.close(across[2], 0.0, 1e-4), self.assertGreater(float(across[0]), 0)
        self.close(y[..., 1] * unit + origin[:, 1], x[..., 1], 1e-4)
        self.close(y.norm(dim=-1) * unit, (x - origin).norm(dim=-1), 1e-4)

    def test_boxed_against_loops(self):
        """Every axis runs from -1 to 1 over the persons and frames that are there, whatever the augmentation; absent ones and scores stay;
        unit undoes it. A test batch is what `normalise` makes of its frames."""
        x = torch.randn(4, 2, 6, 5, 3, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 9.0, 0.2])
        x[1, 1], x[2, :, 3], x[3] = 0, 0, 0
        there = x.flatten(3).any(3)
        y, half = data.boxed(torch.cat([x, torch.full_like(x[..., :1], 0.5)], -1), there, torch.ones(4), 3)
        self.assertFalse(y[..., :3][~there].any() or (y[..., 3] != 0.5).any())
        for n in range(3):
            before, after = x[n][there[n]].flatten(0, 1), y[n, ..., :3][there[n]].flatten(0, 1)  # (joints, 3)
            for c in range(3):
                low, high = min(before[:, c].tolist()), max(before[:, c].tolist())
                self.close(after[:, c], (before[:, c] - low) / (high - low) * 2 - 1, 1e-5)
                self.close(half[n, c], torch.tensor((high - low) / 2), 1e-5)
        layout = {**FIVE, "parts": {**FIVE["parts"], "torso": [0, 1, 2]}}  # a pair of joints by which it could be turned
        source = sequences()
        source.box = True
        for training in (True, False):
            batch = next(iter(Loader(source, layout, 3, 4, 6, training, augmentation=Augmentation(60, 0.1, 0.1, crop=0.5)).epoch()))
            for sequence in batch.x:
                seen = sequence[(sequence != 0).flatten(2).any(2)].flatten(0, 1)
                self.close(seen.amin(0), -torch.ones(3), 1e-4), self.close(seen.amax(0), torch.ones(3), 1e-4)
        raw = source.frames[:, 0] - source.frames[:, 0, :1]  # every frame seen from its first joint: not turned, in the units of the file
        for crop in (1.0, 0.5):
            batch = next(iter(Loader(source, layout, 3, 4, 6, True, augmentation=Augmentation(crop=crop)).epoch()))
            for sequence in batch.x[:, 0] * batch.unit[:, None, None]:
                shown = sequence - sequence[:, :1]
                self.assertLess(float((shown[:, None] - raw).abs().amax((2, 3)).amin(1).max()), 1e-3)
        boxes = data.boxed(x[:3], there[:3], torch.ones(3), 3)[0]
        self.close(data.normalise(x[:3], layout, 3, True)[0], boxes, 1e-5)

    def test_batch_against_plain_indexing(self):
        """A test batch is, sequence by sequence, the middle frames, normalised by the whole sequence; label, presence and unit go along."""
        source = sequences()
        loader = Loader(source, FIVE, 3, batch_size=4, frames=6, training=False)
        batch = next(iter(loader.epoch()))
        for n in range(4):
            L = int(source.length[n])
            whole, _, unit = plain_normalise(source.frames[source.start[n]:source.start[n] + L].transpose(0, 1), [0], 3)
            expected = torch.stack([whole[:, int((t + 0.5) / 6 * L)] for t in range(6)], 1)
            self.close(batch.x[n], expected, 1e-4), self.close(float(batch.unit[n]), float(unit), 1e-4)
        self.assertTrue(torch.equal(batch.label, source.label) and torch.equal(batch.present, source.present)
                        and batch.index.tolist() == [0, 1, 2, 3])

    def test_a_cropped_window_is_normalised_by_itself(self):
        """In a cropped training batch the centre joint averages to zero over each window, and the RMS distance of its joints is 1."""
        for batch in Loader(sequences(), FIVE, 3, 4, 6, True, augmentation=Augmentation(crop=0.3)).epoch(0):
            for x in batch.x:
                seen = x[(x != 0).flatten(2).any(2)]  # (persons and frames that are there, V, C)
                self.close(seen[:, FIVE["centre"]].mean((0, 1)), torch.zeros(3), 1e-4)
                self.close(seen.square().sum(-1).mean(), torch.ones(()), 1e-4)

    def test_batches_depend_on_seed_epoch_and_step_alone(self):
        """Two worker processes build the same tensors as none; drawing epoch 1 first changes nothing; seeds and epochs differ."""
        def epochs(*which, **options):
            loader = Loader(sequences(range(2, 13)), FIVE, 3, 4, 6, True, augmentation=Augmentation(60, 0.1, 0.1, 0.5, 0.1, 0.8), **options)
            return [[vars(b) for b in loader.epoch(e)] for e in which]

        torch.manual_seed(1)
        expected = epochs(0, 1)
        torch.manual_seed(2)
        self.same(epochs(1, 0), expected[::-1])
        self.same(epochs(0, workers=2), expected[:1])
        for other in (epochs(0, seed=1)[0], expected[1]):
            self.assertFalse(torch.equal(other[0]["x"], expected[0][0]["x"]))
        self.assertNotEqual(*([int(i) for b in epoch for i in b["index"]] for epoch in expected))
        alone = Loader(sequences([9]), FIVE, 3, 2, 6, True, augmentation=Augmentation(noise=1), repeat=4)
        first, second, later = (b.x[0] for e in (0, 1) for b in list(alone.epoch(e))[:2 - e])
        self.assertFalse(torch.equal(first, second) or torch.equal(first, later))

    def test_more_workers_than_cores(self):
        """They are no reason to print torch's advice about them."""
        program = ("import os, sys; sys.stderr = sys.stdout; os.sched_getaffinity = lambda _: {0}\n"
                   "import data; built_in = data.load(synthetic_size=32)\n"
                   "print(len(list(data.Loader(built_in.train, built_in.skeleton, 2, 13, 4, True, workers=2).epoch())))")
        self.assertEqual(child(program), "2")

    def test_no_sequence_is_dropped(self):
        """Each pass holds every sequence once; a last batch of one joins its neighbour; testing keeps the file's order."""
        for count, size, repeat, sizes in ((9, 4, 1, [4, 5]),
                                           (10, 4, 1, [4, 4, 2]),
                                           (3, 4, 1, [3]),
                                           (5, 4, 3, [4, 4, 4, 3]),
                                           (1, 4, 1, [1]),
                                           (8, 4, 2, [4] * 4)):
            loader = Loader(sequences([3] * count), FIVE, 3, size, 4, True, repeat=repeat)
            indices = [b.index.tolist() for b in loader.epoch(3)]
            drawn = sum(indices, [])
            self.assertEqual(([len(i) for i in indices], loader.steps), (sizes, len(sizes)))
            for first in range(0, count * repeat, count):
                self.assertEqual(sorted(drawn[first:first + count]), list(range(count)))
            testing = Loader(sequences([3] * count), FIVE, 3, size, 4, False)
            self.assertEqual(sum((b.index.tolist() for b in testing.epoch()), []), list(range(count)))

    def test_processes_share_each_batch(self):
        """The parts of two or three processes are disjoint, each has two sequences or more, which batch norm needs, and together they
        are the batch of one process."""
        for world in (2, 3):
            whole, *parts = [[b.index.tolist() for b in Loader(sequences([3] * 18), FIVE, 3, 7, 4, True, rank=rank, world=of).epoch(1)]
                             for rank, of in [(0, 1), *((r, world) for r in range(world))]]
            if world == 2:
                self.assertEqual([len(step) for step in whole], [7, 7, 4])
            else:
                whole = whole[:-2] + [whole[-2] + whole[-1]]  # four sequences are too few for three processes
            self.assertEqual([sorted(i) for i in whole], [sorted(sum(step, [])) for step in zip(*parts)])
            self.assertTrue(all(len(step) > 1 for part in parts for step in part))

    def test_fill_missing_against_loops(self):
        """A placeholder of score 0 takes the nearest earlier seen position of its sequence, else the nearest later one; where there is
        none, the mean of the person's other joints, and where these have none either, 0."""
        draw = random.Random(0)
        source = sequences([7, 1, 9, 6], channels=3)
        for place in [(f, m, v) for f in range(23) for m in range(2) for v in range(5)]:
            source.frames[place][2] = draw.choice([0.0, 0.0, 0.7])
            if draw.random() < 0.6:
                source.frames[place][:2] = draw.choice([0.0, 1.0])
        source.frames[:7, 0, 0] = torch.tensor([1.0, 1.0, 0.0])
        source.frames[7:8, 1] = torch.tensor([1.0, 1.0, 0.0])
        before, expected, never = source.frames, source.frames.clone(), []
        for start, length in zip(source.start.tolist(), source.length.tolist()):
            for f, m, v in [(f, m, v) for f in range(start, start + length) for m in range(2) for v in range(5)]:
                seen = [t for t in range(start, start + length)
                        if before[t, m, v, 2] > 0 or before[t, m, v, :2].tolist() not in ([0, 0], [1, 1])]
                if f not in seen and seen:
                    expected[f, m, v, :2] = before[max([t for t in seen if t < f], default=seen[0]), m, v, :2]
                elif not seen:
                    never.append((f, m, v))
        for f, m, v in never:
            others = [expected[f, m, w, :2] for w in range(5) if (f, m, w) not in never]
            expected[f, m, v, :2] = torch.stack(others).sum(0) / len(others) if others else 0
        self.assertLess({(7, 1, v) for v in range(5)}, set(never))
        self.assertFalse(torch.equal(before, expected))
        there = data.fill_missing(source.frames, source.start, source.length)
        seen = torch.ones(23, 2, 5, dtype=torch.bool).index_put_(tuple(torch.tensor(never).T), torch.tensor(False))
        self.assertTrue(torch.equal(source.frames[seen], expected[seen]))
        self.close(source.frames, expected)
        self.assertTrue(torch.equal(there, expected[..., :2].any(-1).any(-1)))

    def test_normalise_is_what_the_scripts_do(self):
        """Raw arrays with scores, placeholders, gaps, padding and persons of whom nothing was seen come out of normalise as from the file
        and the test loader, and the model finds the same persons in them."""
        draw, skeleton = torch.Generator().manual_seed(0), SKELETONS["penn13"]
        raw_x = 100 * torch.rand(6, 2, 9, 13, 3, generator=draw)  # (N, M, T, V, C + 1)
        raw_x[..., 2] = (torch.rand(6, 2, 9, 13, generator=draw) > 0.4).float()
        raw_x[4, 1, ..., 2], raw_x[5, ..., 2] = 0, 0  # one person, and both, without any score: guesses and placeholders alone
        raw_x[..., :2] = torch.where((raw_x[..., 2:] == 0) & (torch.rand(6, 2, 9, 13, 1, generator=draw) > 0.5),
                                     torch.randint(2, (6, 2, 9, 13, 1), generator=draw), raw_x[..., :2])
        raw_x[0, :, 6:], raw_x[1, 1], raw_x[2, 0, 3], raw_x[3, 1, 5:] = 0, 0, 0, 0
        listed = [dict(frame_dir=str(n), label=n % 2, keypoint=ndarray((2, 9, 13, 2), x[..., :2].flatten().tolist(), dtype("<f4")),
                       keypoint_score=ndarray((2, 9, 13), x[..., 2].flatten().tolist(), dtype("<f4"))) for n, x in enumerate(raw_x)]
        path = self.write("a.pkl", pickled({"split": {"train": ["0"], "test": list("012345")}, "annotations": listed}))
        for box in (False, True):
            batch = Loader(data.load(path, box=box).test, skeleton, 2, 6, 7, False).batch((torch.arange(6), 0))
            x, _, unit = data.normalise(raw_x, skeleton, 2, box, 7)
            self.close(x, batch.x), self.close(unit, batch.unit)
            for present in (find_present(x, 2), batch.present):
                self.assertEqual(present.tolist(), [[True, n not in (1, 4)] for n in range(6)])
        self.assertFalse(data.normalise(raw_x, skeleton, 2)[0][0, :, 6:, :, :2].any())  # padding stays zero


class AugmentationTest(Case):
    def setUp(self):
        self.x = torch.randn(300, 2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
        self.x[::2, 1], self.x[3, 0, 2] = 0, 0
        self.there = self.x.flatten(3).any(3)[..., None, None]
        self.draw = torch.Generator().manual_seed(1)

    def change(self, x, skeleton=FIVE, C=3, **settings):
        """x augmented, as if it were normalised already."""
        pose = torch.eye(C).repeat(len(x), 1, 1), torch.zeros(len(x), C), torch.ones(len(x))
        return Augmentation(**settings)(x, self.there[..., 0, 0], pose, skeleton, self.draw)

    def test_matrix_products(self):
        """The CPU's and a GPU's way of multiplying, against torch.einsum."""
        class OnGPU(torch.Tensor):
            is_cuda = True

        a, b = torch.randn(5, 3, 4), torch.randn(5, 4, 7)
        for first in (a, a.as_subclass(OnGPU)):
            close(data.compose(first, b), torch.einsum("nij,njk->nik", a, b))

    def test_off_by_default(self):
        """Without settings nothing changes, and whatever is on, zeros stay zero and the score passes through."""
        self.assertTrue(torch.equal(self.change(self.x), self.x))
        scored = torch.cat([self.x, torch.rand(300, 2, 4, 5, 1)], -1)
        y = self.change(scored, rotation=60, scaling=0.1, shift=0.1, noise=0.1)
        self.assertFalse((y[..., :3] * ~self.there).any())
        self.assertTrue(torch.equal(y[..., 3], scored[..., 3]) and (y[..., :3] != scored[..., :3])[self.there.expand(self.x.shape)].all())

    def test_rotation(self):
        """One rotation a sequence: R_x(r) R_y(y), y up to 60 degrees to either side, r up to 30, and 2D data stay as they are."""
        y = self.change(self.x, rotation=60)
        angles = []
        for n in range(300):
            R = torch.linalg.lstsq(self.x[n].reshape(-1, 3), y[n].reshape(-1, 3)).solution.T
            about_y, about_x = math.atan2(R[0, 2], R[0, 0]), math.atan2(R[2, 1], R[1, 1])
            c, s, k, z = math.cos(about_y), math.sin(about_y), math.cos(about_x), math.sin(about_x)
            self.close(R, torch.tensor([[c, 0, s], [z * s, k, -z * c], [-k * s, z, k * c]]), 1e-4)
            self.close(self.x[n] @ R.T, y[n], 1e-4)
            angles.append((math.degrees(about_y), math.degrees(about_x)))
        for found, limit in zip(zip(*angles), (60, 30)):
            self.assertTrue(-limit <= min(found) < -0.9 * limit and 0.9 * limit < max(found) <= limit)
        self.assertTrue(torch.equal(self.change(self.x[..., :2], C=2, rotation=60), self.x[..., :2]))

    def test_flip(self):
        """A mirror image negates x and swaps left and right joints, scores too; it is drawn for half of the sequences."""
        scored = torch.cat([self.x, torch.rand(300, 2, 4, 5, 1)], -1)
        mirror = scored[..., [0, 2, 1, 4, 3], :] * torch.tensor([-1.0, 1, 1, 1])
        self.assertTrue(torch.equal(self.change(scored, flip=1), mirror))
        self.assertTrue(torch.equal(self.change(scored, FIVE | {"pairs": []}, flip=1), scored))  # no pairs, no mirror
        y, flipped = self.change(scored, flip=0.5), 0
        for n in range(300):
            self.assertTrue(torch.equal(y[n], scored[n]) or torch.equal(y[n], mirror[n]))
            flipped += torch.equal(y[n], mirror[n])
        self.assertTrue(110 < flipped < 190)

    def test_scaling_shift_and_noise(self):
        """Scaling and shift are one number per sequence and axis within their reach; noise is Gaussian and differs everywhere."""
        there = self.there.expand(self.x.shape)
        for setting, change in (("scaling", lambda y: y / self.x - 1), ("shift", lambda y: y - self.x)):
            found = change(self.change(self.x, **{setting: 0.1})).masked_fill(~there, math.nan)
            mean = found.flatten(1, 3).nanmean(1)  # (N, C)
            self.close((found - mean[:, None, None, None]).nan_to_num(), torch.zeros_like(found), 1e-3)
            self.assertTrue(-0.101 < mean.min() < -0.095 and 0.095 < mean.max() < 0.101 and (mean[:, 0] - mean[:, 1]).abs().max() > 0.05)
        noise = (self.change(self.x, noise=0.2) - self.x)[there]
        self.assertTrue(abs(noise.mean()) < 0.01 and abs(noise.std() - 0.2) < 0.01 and len(noise.unique()) > 0.9 * len(noise))


class StickFigureTest(Case):
    def test_set(self):
        """Always the same; at least 12 actions, some of two persons, all in both halves; --synthetic-size decides how many."""
        figures, again = data.load(synthetic_size=160), data.load(synthetic_size=160)
        self.same(vars(figures.train), vars(again.train)), self.same(vars(figures.test), vars(again.test))
        self.assertEqual((len(figures.train), len(figures.test), figures.layout, figures.train.frames.shape[1:]),
                         (128, 32, "coco17", (2, 17, 2)))
        self.assertFalse(set(figures.train.names) & set(figures.test.names))
        figures = data.load()
        self.assertGreaterEqual(len(figures.classes), 12)
        for half in (figures.train, figures.test):
            self.assertEqual(set(half.label.tolist()), set(range(len(figures.classes))))
            pairs = {c: half.present[half.label == c, 1].unique().tolist() for c in range(len(figures.classes))}
            self.assertTrue(all(len(p) == 1 for p in pairs.values()) and 2 <= sum(p == [True] for p in pairs.values()) < len(pairs))
        with self.assertRaises(DataError):
            data.load(synthetic_size=16)

    def test_one_pose_does_not_tell(self):
        """A linear classifier of the mean normalised pose of both persons stays below 40 % on the test half."""
        figures, pose = data.load(), {}
        for half in ("train", "test"):
            loader = Loader(getattr(figures, half), figures.skeleton, 2, 2000, 80, False)
            pose[half] = next(iter(loader.epoch())).x.mean(2).flatten(1)
        mean, std = pose["train"].mean(0), pose["train"].std(0) + 1e-6
        layer = torch.nn.Linear(len(mean), len(figures.classes))
        fit = torch.optim.LBFGS(layer.parameters(), max_iter=150)

        def loss():
            fit.zero_grad()
            logits = layer((pose["train"] - mean) / std)
            value = torch.nn.functional.cross_entropy(logits, figures.train.label) + 1e-4 * layer.weight.square().sum()
            value.backward()
            return value

        fit.step(loss)
        right = [(layer((pose[half] - mean) / std).argmax(1) == getattr(figures, half).label).float().mean() for half in ("train", "test")]
        self.assertGreater(right[0], 0.15)  # the classifier did learn something
        self.assertLess(right[1], 0.4)


# ---------------------------------------------------------------------------------------------- scripts

class SettingsTest(Case):
    def test_defaults_are_supplement_a(self):
        """Without flags: Adam 1.5e-4, batch 1024, 50 epochs; SGD 0.1, 0.9, 0.005, batch 128, 110 epochs, the schedule and smoothing."""
        first, second = train_pretrain.parse(train_pretrain.Settings, "", [])[0], train_pretrain.parse(train_finetune.Settings, "", [])[0]
        self.assertEqual((first.lr, first.batch_size, first.epochs, first.dropout,
                          first.mask_parts, first.beta, first.frames, first.layers),
                         (1.5e-4, 1024, 50, 0.2, ("right_arm", "right_leg"), 2, 64, 3))
        self.assertEqual((second.lr, second.momentum, second.weight_decay, second.batch_size,
                          second.epochs, second.warmup, second.milestones, second.label_smoothing),
                         (0.1, 0.9, 0.005, 128, 110, 5, (90, 100), 0.1))
        self.assertEqual((second.dropout, second.attention_dropout, second.strl_layers, second.layers, second.frames), (0.2, 0.1, 3, 3, 64))

    def test_frames_that_fit_move_to_the_gpu(self):
        """Each half moves where it fits into half of the free memory; halves that share their frames share them there too."""
        def moved(read, free):  # the frames that were asked to move
            frames = []

            def to(half, device):
                frames.append(half.frames)
                return data.replace(half, frames=half.frames.clone(), there=half.there.clone())

            with (unittest.mock.patch.object(data.Sequences, "to", to),
                  unittest.mock.patch("torch.cuda.mem_get_info", lambda device: (free, 0))):
                train_pretrain.loaders(train_pretrain.Settings(), read, torch.device("cuda"), 0, 1)
            return frames

        shared = data.load(None, synthetic_size=64)
        size, apart = shared.train.frames.nbytes, copy.deepcopy(shared)
        apart.test.frames = apart.test.frames[:len(apart.test.frames) // 2].clone()
        for free, expected in ((2 * size + 2, [apart.train, apart.test]), (2 * size - 2, [apart.test]), (100, [])):
            self.assertEqual([id(frames) for frames in moved(apart, free)], [id(half.frames) for half in expected])
        frames = moved(shared, 2 * size + 2)
        self.assertIs(frames[0], shared.train.frames)
        self.assertFalse(any(f is shared.test.frames for f in frames[1:]))  # what moved is used again

    def test_parse(self):
        """Flags are typed and checked; a misspelled one names the nearest; nothing is abbreviated."""
        flags = "--milestones 3,5 --no-amp --nesterov --ckpt --label-fraction 0.5"
        settings, given = train_pretrain.parse(train_finetune.Settings, "", flags.split())
        self.assertEqual((settings.milestones, settings.amp, settings.nesterov, settings.ckpt, settings.label_fraction),
                         ((3, 5), False, True, "newest", 0.5))
        self.assertEqual(given, {"milestones", "amp", "nesterov", "ckpt", "label_fraction"})
        for line, words in (("--epoch 3", ["--epochs"]),
                            ("--lable-fraction=1", ["--label-fraction"]),
                            ("--zzz", ["--zzz"]),
                            ("--epochs 0", ["--epochs", "out of range"]),
                            ("--seed 2147483649", ["--seed", "2147483649 is out of range"]),
                            ("--epochs 1" + 400 * "0", ["--epochs", "out of range"]),
                            ("--lr nan", ["--lr"]),
                            ("--momentum 1.5", ["0 to 1"]),
                            ("--milestones 3,-1", ["--milestones", "-1) is out of range"]),
                            ("--epochs many", ["--epochs", "many"]),
                            ("--batch-size", ["--batch-size"]),
                            ("stray", ["stray"])):
            with self.assertRaises(train_pretrain.Failure) as caught:
                train_pretrain.parse(train_finetune.Settings, "", line.split())
            message = str(caught.exception)
            self.assertTrue(all(word in message for word in words) and "\n" not in message, message)

    def test_learning_rate_of_all_epochs(self):
        """METHOD.md: 0.1 (e + 1) / 5 for e < 5, 0.1 until 89, 0.01 from 90, 0.001 from 100."""
        expected = [0.02, 0.04, 0.06, 0.08, 0.1] + [0.1] * 85 + [0.01] * 10 + [0.001] * 10
        self.close(torch.tensor([train_finetune.learning_rate(e, 0.1, 5, (90, 100)) for e in range(110)]), torch.tensor(expected), 1e-7)

    def test_augmentation_suits_the_data(self):
        """What was not asked for suits 2D or 3D data, any value stands as it is."""
        settings = train_pretrain.Settings(shift=0.3, noise=0)
        self.assertEqual(train_pretrain.augmentation(settings, 3), Augmentation(rotation=30, scaling=0.1, shift=0.3))
        self.assertEqual(train_pretrain.augmentation(settings, 2), Augmentation(scaling=0.1, shift=0.3, flip=0.5))


class MeasureTest(Case):
    def test_replay(self):
        """With graphs that only pretend: every batch, the recorded ones too, gives the loss of its own tensors, and keeps it."""
        def loss(packing, x):
            return x.sum() + sum((index * torch.arange(1.0, len(index) + 1)).sum()
                                 for index in (packing.rows, packing.sequence, packing.count))

        class Graph:
            def replay(self):
                self.loss.copy_(loss(*self.inputs))

        @contextlib.contextmanager
        def record(graph, pool):
            recording.append(graph)
            yield

        def step(packing, x):
            if not recording:
                return loss(packing, x)
            graph = recording.pop()
            graph.inputs, graph.loss = (packing, x), torch.zeros(())
            return graph.loss

        recording, results = [], []
        with unittest.mock.patch.multiple(torch.cuda, graph_pool_handle=unittest.mock.DEFAULT, CUDAGraph=Graph, graph=record):
            replay = train_pretrain.Replay(step)
            for i in range(18):
                packing, x = Packing(torch.tensor([[True, (n + i // 3) % 3 < i % 3] for n in range(3)]), "cpu"), torch.randn(3, 2)
                results.append((replay(packing, x), loss(packing, x)))
        self.close(*map(torch.stack, zip(*results)))
        self.assertEqual((len(replay.recorded), None in replay.recorded.values()), (3, False))

    def test_label_subset(self):
        """Of each class round(fraction x size), at least one; sorted, without doubles, another choice for another seed."""
        labels = torch.tensor([0] * 40 + [3] * 11 + [2] * 2)[torch.randperm(53, generator=torch.Generator().manual_seed(0))]
        for fraction in (0.1, 0.26, 0.5, 0.01):
            kept = train_finetune.label_subset(labels, fraction, 0)
            self.assertEqual(Counter(labels[kept].tolist()), {c: max(1, round(fraction * n)) for c, n in ((0, 40), (3, 11), (2, 2))})
            self.assertEqual(kept.tolist(), sorted(set(kept.tolist())))
            self.assertTrue(torch.equal(kept, train_finetune.label_subset(labels, fraction, 0)))
        self.assertFalse(torch.equal(train_finetune.label_subset(labels, 0.5, 0), train_finetune.label_subset(labels, 0.5, 1)))

    def test_metrics_against_loops(self):
        """Top-1, top-5 and the mean over the classes present of each class's accuracy, in percent."""
        logits = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0] * 30 + [1] * 20 + [5] * 10)
        logits[torch.arange(60), labels] += 1
        order = [sorted(range(8), key=lambda k: -row[k]) for row in logits.tolist()]
        right = [ranked[0] == label for ranked, label in zip(order, labels.tolist())]
        expected = dict(top1=100 * sum(right) / 60,
                        top5=100 * sum(label in ranked[:5] for ranked, label in zip(order, labels.tolist())) / 60,
                        mean_class=100 * (sum(right[:30]) / 30 + sum(right[30:50]) / 20 + sum(right[50:]) / 10) / 3)
        self.assertEqual(len({round(v, 3) for v in expected.values()}), 3)
        found = train_finetune.metrics({"logits": logits, "labels": labels})
        for name, value in expected.items():
            self.assertAlmostEqual(found[name], value, 3)

    def test_neighbours_against_loops(self):
        """Distances by breadth-first search; each joint's guess is the mean of its nearest visible joints."""
        for skeleton in (FIVE, SKELETONS["coco17"], FIVE | {"edges": [[0, 1], [3, 4]]}):
            V = len(skeleton["joints"])
            hops = train_pretrain.joint_distances(skeleton)
            near = {v: {w for e in skeleton["edges"] for w in e if v in e} for v in range(V)}
            expected = torch.full((V, V), float(V))
            for v in range(V):
                reached, ring, distance = set(), {v}, 0
                while ring:
                    expected[v, list(ring)] = float(distance)
                    reached |= ring
                    ring, distance = {w for u in ring for w in near[u]} - reached, distance + 1
            self.assertTrue(torch.equal(hops, expected))
            x, mask = torch.randn(6, 2, 3, V, 2), draw_mask(6, skeleton, ratio=0.4, generator=torch.Generator().manual_seed(0))
            mask = torch.stack([mask, mask.flip(0), mask.roll(1, 0)], 1)  # (N, T, V): every frame has its own
            guess = train_pretrain.neighbour_mean(x, mask, hops)
            equal(train_pretrain.neighbour_mean(x[:, :, :1], mask[:, :1], hops), guess[:, :, :1])
            for n, t in product(range(6), range(3)):
                visible = [v for v in range(V) if not mask[n, t, v]]
                for v in range(V):
                    best = min(expected[v, w] for w in visible)
                    self.close(guess[n, :, t, v], torch.stack([x[n, :, t, w] for w in visible if expected[v, w] == best]).mean(0))

    def test_scale_and_mean_pose_against_loops(self):
        """Over the frames that show somebody: the root mean square distance of the joints from the origin, each person's mean pose."""
        source, poses = sequences([5, 9, 3, 12, 2]), ([], [])
        source.frames[2:4, 1] = source.there[2:4, 1] = 0
        loader = Loader(source, FIVE, 3, 3, 6, False)
        for x in (batch.x for batch in loader.epoch()):
            for n, m, t in product(range(len(x)), range(2), range(6)):
                poses[m].extend([x[n, m, t]] * bool(x[n, m, t].any()))
        scale, pose = train_pretrain.measure_scale(loader)
        self.close(scale, torch.stack([joint.norm() for person in poses for x in person for joint in x]).square().mean().sqrt(), 1e-5)
        self.close(pose, torch.stack([torch.stack(person).mean(0) for person in poses]), 1e-5)

    def test_reconstruction_errors_are_in_the_units_of_the_file(self):
        """Against loops over the masked joints of present persons; data ten times as large give errors ten times as large."""
        model, results, pose = SkeletonMAE(FIVE, 3, 8, 8, mask_parts=("right_arm", "left_leg")).eval(), [], torch.randn(2, 5, 3)
        for factor in (1, 10):
            source = sequences([5, 9, 3, 12, 2])
            source.frames *= factor
            source.frames[2:4, 1] = source.there[2:4, 1] = 0  # the second person is out of sight for two frames
            loader = Loader(source, FIVE, 3, 3, 6, False)
            results.append(train_pretrain.reconstruction_error(model, loader, pose))
            sums, count = [0, 0], 0
            for batch in loader.epoch():
                for n, m, t, v in [(n, m, t, v) for n, m, t in product(range(len(batch.x)), range(2), range(6))
                                   if batch.x[n, m, t].any() for v in (2, 3)]:
                    x, count = batch.x[n, m, t], count + 1
                    for i, guess in enumerate((pose[m, v], x[0])):  # the root is the one neighbour of hands and feet
                        sums[i] += float((guess - x[v]).norm() * batch.unit[n])
            self.close([results[-1]["mean_pose_error"], results[-1]["neighbour_error"]], [s / count for s in sums], 1e-4)
        self.assertGreater(results[0]["joint_error"], 0)
        for name in results[0]:
            self.assertAlmostEqual(results[1][name] / results[0][name], 10, 3)


class ScriptCase(Case):
    """Both scripts as a user runs them, on 24 + 12 sequences of the 5-joint skeleton, in a folder of their own."""

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        draw = torch.Generator().manual_seed(0)
        self.content = {key: value for half, count in (("train", 25), ("test", 12)) for key, value in
                        ((f"x_{half}", [torch.randn(6 + n % 5, 1 + n % 2, 5, 3, generator=draw) + n % 3 for n in range(count)]),
                        (f"y_{half}", [n % 3 for n in range(count)]))}
        torch.save(self.content, "tiny.pt")
        Path("five.json").write_text(json.dumps(FIVE))
        self.data = "--data tiny.pt --layout five.json"

    def script(self, module, line: str, status: int = 0) -> str:
        """Runs it in this process and returns its stdout, or, where it fails, its stderr of three lines at most."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                train_pretrain.run(lambda: module.main(line.split()))
            except SystemExit as end:
                code = end.code
        self.assertEqual(code, status, err.getvalue())
        self.assertLessEqual(len(err.getvalue().splitlines()), 3 if status else 0, err.getvalue())
        return err.getvalue() if status else out.getvalue()

    def pretrain(self, line: str, status: int = 0) -> str:
        shape = f"{TINY_RUN} --frames 8 --eval-every 1 " * ("--resume" not in line)
        return self.script(train_pretrain, "--device cpu " + shape + line, status)

    def finetune(self, line: str, status: int = 0) -> str:
        shape = ("" if re.search("--eval-only|--resume", line)
                 else "--strl-layers 2 --blocks 1 --frames 8 --eval-every 1 " + f"{TINY_RUN} " * ("--ckpt" not in line))
        return self.script(train_finetune, "--device cpu " + shape + line, status)


class ScriptTest(ScriptCase):
    def test_pretrain_then_finetune(self):
        """Bare --ckpt takes the newest pre-training and its data; log, outputs and --eval-only agree with what was printed."""
        self.pretrain(f"{self.data} --epochs 1 --out runs/old")
        os.utime("runs/old/pretrain.pt", (1, 1))
        self.assertIn("held-out joint error", self.pretrain(f"{self.data} --epochs 2 --batch-size 8"))
        self.assertIn("divide by 4", self.pretrain(f"{self.data} --epochs 1 --hidden 6 --out six"))
        printed = self.finetune("--ckpt --epochs 3 --batch-size 8")
        self.assertIn("runs/pretrain/pretrain.pt", printed)
        accuracies = re.compile(r"top-1 ([\d.]+) %, top-5 ([\d.]+) %, mean class accuracy ([\d.]+) %")
        shown = accuracies.findall(printed)
        self.assertEqual(len(shown), 1)
        for log, epochs in (("runs/pretrain/log.csv", 2), ("runs/finetune/log.csv", 3)):
            with open(log, newline="") as file:
                rows = list(csv.DictReader(file))
            self.assertEqual([int(row["epoch"]) for row in rows], list(range(1, epochs + 1)))
            self.assertTrue(all(math.isfinite(float(value)) for row in rows for value in row.values()))
        self.assertEqual(tuple(f"{float(rows[-1][name]):.2f}" for name in ("top1", "top5", "mean_class")), shown[0])
        trained = torch.load("runs/finetune/test_outputs.pt", weights_only=True)
        self.assertEqual((trained["logits"].shape, trained["features"].shape, trained["labels"].tolist()),
                         ((12, 3), (12, 16), self.content["y_test"]))
        checkpoint = torch.load("runs/finetune/finetune.pt", weights_only=True)
        self.close(trained["features"] @ checkpoint["model"]["head.weight"].T + checkpoint["model"]["head.bias"], trained["logits"])
        self.assertEqual(accuracies.findall(self.finetune("--ckpt runs/finetune/finetune.pt --eval-only --out again")), shown)
        again = torch.load("again/test_outputs.pt", weights_only=True)
        for key, value in trained.items():  # on an Intel Xeon two evaluations were equal only up to rounding
            (self.close if key in ("logits", "features") else self.same)(again[key], value)
        self.assertFalse(os.path.exists("again/finetune.pt"))
        with unittest.mock.patch.dict(os.environ, RANK="1"):  # of several processes the first alone writes
            self.finetune("--ckpt runs/finetune/finetune.pt --eval-only --out other")
        self.assertFalse(os.path.exists("other/test_outputs.pt"))
        os.utime("runs/old/pretrain.pt")  # now it is the newest, and yet the same command line goes on with what it began with
        self.assertIn("from runs/pretrain/pretrain.pt", self.finetune("--ckpt --resume --epochs 4"))
        self.finetune(f"{self.data} --epochs 1 --out random")
        self.assertIn("--ckpt", self.finetune("--ckpt --resume --epochs 2 --out random", 2))  # this one began with none

    def test_fine_tuning_by_hand(self):
        """S A's settings reach the weights: three steps of SGD (warm-up, milestone, label smoothing, weight decay, momentum,
        clipping) and of AdamW written out."""
        for optimizer, flags in (("sgd", "--lr 0.1 --weight-decay 0.1 --momentum 0.8"), ("sgd", "--lr 0.1 --nesterov --clip 0.3"),
                                 ("adamw", "--lr 0.01 --weight-decay 2 --label-smoothing 0.3")):
            line = f"{self.data} {TINY_RUN} --frames 8 --strl-layers 2 --blocks 1 --epochs 3 --warmup 2 --milestones 2 --dropout 0"
            line += f" --attention-dropout 0 --optimizer {optimizer} {flags}"
            settings, _ = train_pretrain.parse(train_finetune.Settings, "", line.split())
            dataset = data.load("tiny.pt", layout="five.json")
            torch.manual_seed(0)
            model, _, _ = train_finetune.build(settings, dataset, None)
            train, _ = train_pretrain.loaders(settings, dataset, torch.device("cpu"), 0, 1)
            state, smoothing = {}, settings.label_smoothing
            for epoch, lr in enumerate((settings.lr / 2, settings.lr, settings.lr / 10)):
                batch, = train.epoch(epoch)
                target = (1 - smoothing) * F.one_hot(batch.label, 3) + smoothing / 3
                loss = -(target * model.train()(batch.x, batch.present).log_softmax(1)).sum(1).mean()
                learned = [p for p in model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(loss, learned)
                norm = sum(g.square().sum() for g in gradients).sqrt()
                for p, g in zip(learned, gradients):
                    g = g * min(1, settings.clip / float(norm)) if settings.clip else g
                    if optimizer == "adamw":
                        first, second = state.get(p, (0, 0))
                        state[p] = first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
                        mean, square = first / (1 - 0.9 ** (epoch + 1)), second / (1 - 0.999 ** (epoch + 1))
                        change = mean / (square.sqrt() + 1e-8) + settings.weight_decay * p
                    else:
                        g = g + settings.weight_decay * p
                        state[p] = settings.momentum * state[p] + g if p in state else g
                        change = g + settings.momentum * state[p] if settings.nesterov else state[p]
                    p.data -= lr * change.detach()
            self.finetune(f"{line} --out run")
            trained = torch.load("run/finetune.pt", weights_only=True)
            for name, parameter in model.named_parameters():
                self.close(trained["model"][name], parameter.detach(), 5e-3 if optimizer == "adamw" else 1e-4)  # its steps magnify rounding
            self.assertEqual([round(row["lr"] / settings.lr, 6) for row in trained["log"]], [0.5, 1, 0.1])

    def test_pretraining_by_hand(self):
        """Two steps of Adam written out, on gradients of micro-batches of 10, 10 and 5;
        `scale` is the root mean square of the joints' distances."""
        line = f"{self.data} --epochs 2 --lr 0.01 --dropout 0 --micro-batch 10"
        self.pretrain(line)
        trained = torch.load("runs/pretrain/pretrain.pt", weights_only=True)
        dataset = data.load("tiny.pt", layout="five.json")
        squares = [float(joint.square().sum()) for batch in Loader(dataset.train, dataset.skeleton, 3, 1, 8, False).epoch()
                   for sequence in batch.x for person in sequence for frame in person if frame.any() for joint in frame]
        torch.manual_seed(0)
        model = SkeletonMAE(**trained["model_settings"])
        model.scale.fill_((sum(squares) / len(squares)) ** 0.5)
        self.close(trained["model"]["scale"], model.scale)
        settings, _ = train_pretrain.parse(train_pretrain.Settings, "", f"{line} --frames 8".split())
        train, _ = train_pretrain.loaders(settings, dataset, torch.device("cpu"), 0, 1)
        learned = list(model.parameters())
        moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in learned]
        for epoch in range(2):
            batch, = train.epoch(epoch)
            losses = [len(x) / 25 * model(x, present)[0] for x, present in zip(batch.x.split(10), batch.present.split(10))]
            for p, moment, g in zip(learned, moments, torch.autograd.grad(sum(losses), learned)):
                moment[:] = 0.9 * moment[0] + 0.1 * g, 0.999 * moment[1] + 0.001 * g.square()
                p.data -= 0.01 * moment[0] / (1 - 0.9 ** (epoch + 1)) / ((moment[1] / (1 - 0.999 ** (epoch + 1))).sqrt() + 1e-8)
            self.assertAlmostEqual(trained["log"][epoch]["loss"], float(sum(losses).detach()), 4)
        for name, parameter in model.named_parameters():
            self.close(trained["model"][name], parameter.detach(), 1e-3)

    def test_full_memory(self):
        """A GPU or a machine without memory left is one line that names the flags that help."""
        on_cpu = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to\nallocate"
        for error, whose in ((torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), "GPU's memory"),
                             (RuntimeError(on_cpu), "memory"),
                             (MemoryError(), "memory")):
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
                train_pretrain.run(unittest.mock.Mock(side_effect=error))
            self.assertEqual(end.exception.code, 2)
            self.assertRegex(said.getvalue(), rf"^error: the {whose} is full \(.*\).*--micro-batch.*\n$")
        self.assertRaises(RuntimeError, train_pretrain.run, unittest.mock.Mock(side_effect=RuntimeError("a mistake of ours")))

    def test_the_process_group_ends_with_the_run(self):
        """torchrun's processes part once main is done."""
        with unittest.mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME="lo"):
            torch.distributed.init_process_group("gloo", init_method=f"file://{self.folder}/store", rank=0, world_size=1)
        train_pretrain.run(lambda: None)
        self.assertFalse(torch.distributed.is_initialized())

    def test_interrupted(self):
        """Ctrl-C ends with status 130, SIGTERM with 143, both with one line that says how to go on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
                train_pretrain.run(lambda: signal.raise_signal(number))
            self.assertEqual(end.exception.code, status)
            self.assertRegex(said.getvalue().strip(), r"^stopped; .*--resume goes on after the last of them$")
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
                train_pretrain.run(lambda: signal.raise_signal(number), resumes=False)
            self.assertEqual((end.exception.code, said.getvalue().strip()), (status, "stopped"))

    def test_two_processes(self):
        """Two processes share every batch: one of them prints and writes, their weights are equal to the last bit, the losses follow
        those of one process, and --resume goes on; pre-training and fine-tuning."""
        program = """
import os, sys, {script} as script, torch
made = []
class Kept(script.{model}):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        made.append(self)
script.{model} = Kept
script.main(sys.argv[1:])
torch.save(dict(made[0].named_parameters()), os.environ["RANK"] + ".weights")
"""
        for module, script, model, tail in ((self.pretrain, "train_pretrain", "SkeletonMAE", ""),
                                            (self.finetune, "train_finetune", "SkeletonClassifier",
                                             " --strl-layers 2 --blocks 1 --attention-dropout 0")):
            # 4 = 2 + 2 here, 3 there: another number of passes
            line = f"{self.data} --dropout 0 --batch-size 7 --lr 0.01" + " --micro-batch 2" * (script == "train_pretrain")
            module(f"{line} --epochs 3 --out runs/alone" + " --attention-dropout 0" * bool(tail))
            source = program.format(script=script, model=model)
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            for words in (f"{line} {TINY_RUN} --frames 8 --epochs 2{tail}", "--resume --epochs 3"):
                command = [sys.executable, "-c", source, *f"--device cpu --out runs/together {words}".split()]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                               "MASTER_PORT": str(port), "PYTHONPATH": os.path.dirname(data.__file__)}
                jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                         env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
                said = [job.communicate() for job in jobs]
                self.assertEqual([(job.returncode, errors) for job, (_, errors) in zip(jobs, said)], [(0, "")] * 2)
                self.assertEqual((said[1][0], said[0][0].count("epoch 2/2") + said[0][0].count("epoch 3/3")), ("", 1))
                self.same(*(torch.load(f"{rank}.weights", weights_only=True) for rank in (0, 1)))
            losses = []
            for folder in ("runs/alone", "runs/together"):
                with open(folder + "/log.csv", newline="") as file:
                    losses.append([float(row["loss"]) for row in csv.DictReader(file)])
            torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.25, atol=0.01)
            self.assertNotEqual(*losses)
            shutil.rmtree("runs")

    def test_documented_commands(self):
        """Every command line of the docstrings and the README is one that its script takes; the README's Python lines run as they stand."""
        readme = Path(__file__).with_name("README.md").read_text()
        documents = "\n".join([train_pretrain.__doc__, train_finetune.__doc__, readme])
        commands = re.findall(r"python (train_pretrain|train_finetune)\.py([^&#|`\n]*)", documents)
        self.assertGreater(len(commands), 10)
        for script, words in commands:
            with self.subTest(script + words):
                if "..." not in words:
                    train_pretrain.parse(getattr(sys.modules[script], "Settings"), "", words.split())
        convert, classify, encode = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        self.assertEqual(len(classify.strip().splitlines()), 5)
        self.assertRegex(classify, r"x = .*# yours")
        for flags in ("", "--box --motion"):
            self.finetune(f"{self.data} --epochs 1 {flags}")
            outputs = torch.load("runs/finetune/test_outputs.pt", weights_only=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(classify, {})
                for n, x in enumerate(self.content["x_test"]):  # as the script's own test sees them
                    own = {"yours": F.pad(x, (0, 0, 0, 0, 0, 2 - x.shape[1], 0, n)).transpose(0, 1)[None]}  # and padded
                    exec(re.sub(r"x = .*# yours.*", "x = yours", classify).replace("print(", "logits = (").replace(".argmax(1)", ""), own)
                    self.close(own["logits"][0].detach(), outputs["logits"][n], 1e-4)
            self.assertRegex(printed.getvalue(), r"tensor\(\[[0-2]\]\)")
        self.pretrain(f"{self.data} --epochs 1")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(classify + encode, {})
        self.assertIn("torch.Size([1, 2, 8, 5, 8])", printed.getvalue())
        os.mkdir("all_sqe")
        for i, name in enumerate(("a01_s01_e00_v01", "a12_s02_e03_v02", "a12_s02_e03_v03", "a02_s01_e00_v03")):
            Path("all_sqe", name + ".json").write_text(json.dumps({"skeletons": torch.full((2 + i % 3, 20, 3), min(i, 2) + 0.5).tolist()}))
        Path("all_sqe", "a08_s01_e00_v02.json").write_text(Path("all_sqe", "a02_s01_e00_v03.json").read_text())  # a copy of a test sequence
        exec(convert, {})
        read = data.load("nwucla.pt")
        self.assertEqual((read.layout, read.train.label.tolist(), read.test.label.tolist()), ("kinect20", [0, 9], [1, 9]))

    def test_zero_frames_at_the_end_change_nothing(self):
        """METHOD: padding never reaches the model. 100 zero frames after every sequence of an npz: identical logits."""
        x = [torch.randn(2, T, 60, generator=torch.Generator().manual_seed(T)) for T in (7, 107)]
        x[1][:, :7], x[1][:, 7:] = x[0], 0
        outputs = []
        for T, values in zip((7, 107), x):
            half = npy("<f4", (2, T, 60), values.flatten().tolist())
            labels = npy("<i8", (2,), [0, 1])
            self.write("padded.npz", zipped(x_train=half, y_train=labels, x_test=half, y_test=labels))
            source = data.load("padded.npz")
            model = SkeletonClassifier(source.skeleton, 3, 2, frames=8, width=8, hidden=8, layers=1).eval()
            torch.manual_seed(0)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            outputs.append(train_finetune.evaluate(model, Loader(source.test, source.skeleton, 3, 2, 8, False), torch.device("cpu"), False))
        self.same(*outputs)

    def test_linear_probe_and_label_fraction(self):
        """The probe leaves the encoder as it was and trains the rest; a fraction of 0.25 trains on two labels of each class."""
        self.pretrain(f"{self.data} --epochs 1")
        before = torch.load("runs/pretrain/pretrain.pt", weights_only=True)["model"]
        self.finetune("--ckpt --linear-probe --epochs 2 --out probe")
        after = torch.load("probe/finetune.pt", weights_only=True)["model"]
        self.same({name: after["pretrained." + name] for name in before}, dict(before))
        self.assertIn("head.weight", after)
        self.finetune("--ckpt --linear-probe --epochs 2 --encoder-lr-scale 0 --out probe")  # of the encoder, which is frozen anyway
        self.same(torch.load("probe/finetune.pt", weights_only=True)["model"], after)
        self.finetune("--ckpt probe/finetune.pt --eval-only --out probe")
        self.assertIn("6 labelled sequences", self.finetune("--ckpt --label-fraction 0.25 --epochs 1 --batch-size 8"))
        counts = lambda: torch.load("runs/finetune/test_outputs.pt", weights_only=True)["train_counts"].tolist()
        self.assertEqual(counts(), [2, 2, 2])
        self.finetune("--ckpt runs/finetune/finetune.pt --eval-only")
        self.assertEqual(counts(), [2, 2, 2])

    def test_pretrained_weights_are_used(self):
        """With a learning rate of 0 embedding and encoders equal the pre-trained ones; without --ckpt they do not."""
        self.pretrain(f"{self.data} --epochs 1")
        before = torch.load("runs/pretrain/pretrain.pt", weights_only=True)["model"]
        for line, equal in (("--ckpt", True), (self.data, False)):
            self.finetune(f"{line} --epochs 1 --lr 0")
            after = torch.load("runs/finetune/finetune.pt", weights_only=True)["model"]
            for name in ("embedding.linear.weight", "encoder.layers.0.linear.weight"):
                for own in [name] if name.startswith("emb") else [f"strl.layers.{i}.{name}" for i in range(2)]:
                    self.assertEqual(torch.equal(after[own], before[name]), equal)

    def test_probe_of_any_layout(self):
        """A linear probe masks nothing, so it needs no right arm and leg."""
        own = types.SimpleNamespace(skeleton=STAR, channels=2, score=False, persons=1, classes=[0, 1])
        probe = train_finetune.build(train_finetune.Settings(linear_probe=True), own, None)[0]
        self.assertEqual(probe(torch.randn(3, 1, 4, 5, 2)).shape, (3, 2))

    def test_pretrained_stack(self):
        """Fine-tuning takes the shape of pre-trained STRL layers, and how their data were normalised, from the checkpoint,
        and refuses others; the probe freezes them."""
        self.pretrain(f"{self.data} --epochs 1 --box{STACK}")
        before = torch.load("runs/pretrain/pretrain.pt", weights_only=True)["model"]
        self.finetune("--ckpt --epochs 1 --lr 0")
        after, settings = (torch.load("runs/finetune/finetune.pt", weights_only=True)[key] for key in ("model", "settings"))
        self.assertEqual((settings["frames"], settings["strl_layers"], settings["box"]), (8, 2, True))
        named = {name.replace("encoder", "strl", 1): value for name, value in before.items()
                 if name.startswith("encoder.") and "running" not in name}
        self.same({name: after[name] for name in named if "num_batches" not in name},
                  {n: v for n, v in named.items() if "num_batches" not in n})
        self.assertIn("--stride 3 differs from 2", self.finetune("--ckpt --stride 3", 2))
        self.assertIn("--box False differs from True", self.finetune("--ckpt --no-box", 2))
        self.finetune("--ckpt --linear-probe --epochs 1 --out probe")
        after = torch.load("probe/finetune.pt", weights_only=True)["model"]
        self.same({name: after["pretrained." + name] for name in before}, dict(before))
        self.finetune("--ckpt probe/finetune.pt --eval-only --out probe")

    def test_encoder_lr_scale(self):
        """At a scale of 0 every pre-trained weight stays as it was, after --resume too, and the others move: the encoder was
        pre-trained, or the whole stack."""
        for flags, fixed in (("", r"embedding\.|.*\.encoder\."), (STACK, r"embedding\.|strl\.")):
            self.pretrain(f"{self.data} --epochs 1{flags}")
            self.finetune("--ckpt --epochs 1 --encoder-lr-scale 0 --lr 0.1")
            before = torch.load("runs/finetune/finetune.pt", weights_only=True)
            started = torch.load("runs/pretrain/pretrain.pt", weights_only=True)["model"]["embedding.linear.weight"]
            self.assertTrue(before["model"]["embedding.linear.weight"].equal(started))
            self.finetune("--resume --epochs 2")
            after = torch.load("runs/finetune/finetune.pt", weights_only=True)["model"]
            model = train_finetune.SkeletonClassifier(**before["model_settings"])
            learned = [name for name, _ in model.named_parameters() if "mask_token" not in name]
            stayed = {name for name in learned if after[name].equal(before["model"][name])}
            self.assertEqual(stayed, {name for name in learned if re.match(fixed, name)})

    def test_hint_for_a_small_set(self):
        """Below 2,000 steps both scripts advise the README's recipe and as many passes as make 4,000 steps: what changes nothing
        or what the checkpoint decides is left out, so the flags are accepted. Resuming and probes hint at nothing."""
        def hint(printed):
            return re.search("hint: .* steps in all is little training; for a small set try (.*)", printed)

        optimizer, model = "--batch-size 16 --optimizer adamw --lr 0.003 --weight-decay 0.05 --clip 5 ", "--motion --bone --hidden 64 "
        for flags, fixed in (("", "--frames 16 "), (STACK, "")):
            printed = self.pretrain(f"{self.data} --epochs 2{flags}")
            expected = f"--batch-size 32 --lr 0.001 {model}--frames 16 --crop 0.3 --repeat 2560 --box --rotation 60"
            self.assertEqual(hint(printed)[1], expected)
            printed = hint(self.finetune("--ckpt --epochs 1"))[1]  # which has --blocks 1
            self.assertEqual(printed, f"{optimizer}{fixed}--crop 0.3 --repeat 2560 --rotation 60")
            self.finetune(f"--ckpt --epochs 1 {printed} --repeat 1")
        self.assertIsNone(hint(self.finetune("--resume --epochs 2")))
        self.assertIsNone(hint(self.finetune("--ckpt --epochs 1 --linear-probe")))
        printed = hint(self.finetune(f"{self.data} --epochs 1 --frames 16"))[1]
        self.assertEqual(printed, f"{optimizer}{model}--crop 0.3 --repeat 2560 --box --rotation 60")
        train = data.load("tiny.pt", layout="five.json").train
        self.assertGreaterEqual(Loader(train, FIVE, 3, 16, 16, True, repeat=2560).steps, 4000)
        self.assertNotIn("--box", hint(self.pretrain("--synthetic-size 32 --epochs 1"))[1])  # in 2D
        printed = hint(self.finetune(f"{self.data} --epochs 1 --nesterov"))[1]
        self.finetune(f"{self.data} --epochs 1 --nesterov {printed} --repeat 1")
        line = f"{self.data} --epochs 1 --strl-layers 3 --stride 5 --frames 30"
        self.pretrain(f"{line} {hint(self.pretrain(line))[1]} --repeat 1")

    def test_hint_for_a_long_warm_up(self):
        """Where the warm-up does not end, fine-tuning says so."""
        for flags, said in (("--epochs 3 --milestones 2", True), ("--epochs 3 --milestones 2 --warmup 2", False),
                            ("--epochs 2 --warmup 3", True), ("--epochs 2 --warmup 2", False),
                            ("--epochs 2 --milestones 0 --warmup 0", False),
                            ("--epochs 4 --milestones 2 --warmup 3", False)):  # the warm-up goes first
            self.assertEqual("the learning rate does not reach --lr" in self.finetune(f"{self.data} {flags}"), said, flags)

    def test_a_moved_folder_is_resumed_where_it_is(self):
        """--resume goes on in the folder it found, not in the one that the run was started with."""
        self.pretrain(f"{self.data} --epochs 1 --out first")
        os.renames("first", "runs/pretrain")
        self.pretrain("--resume --epochs 2")
        self.assertFalse(os.path.exists("first"))

    def test_resume_is_exact(self):
        """2 + 2 epochs equal 4, bit for bit: weights, optimiser and log; another setting is refused by name."""
        for module, name, flags, moment in ((self.pretrain, "pretrain", "", "exp_avg"),
                                            (self.pretrain, "pretrain", STACK, "exp_avg"),
                                            (self.finetune, "finetune", "", "momentum_buffer"),
                                            (self.finetune, "finetune", " --optimizer adamw", "exp_avg")):
            lines = f"{self.data} --batch-size 8 --lr 0.01{flags}"
            module(f"{lines} --epochs 4 --out whole")
            module(f"{lines} --epochs 2 --out halves")
            for wrong in ("--lr 0.1", "--seed 3", "--batch-size 4", "--data other.pt"):
                self.assertIn(wrong.split()[0], module(f"--out halves --resume {wrong}", 2))
            module("--out halves --resume --epochs 4")
            whole, halves = (torch.load(f"{out}/{name}.pt", weights_only=True) for out in ("whole", "halves"))
            self.assertIn(moment, whole["optimizer"]["state"][0])  # of the optimiser that was asked for
            for key in ("model", "optimizer", "log", "epoch", "kind", "skeleton"):
                self.same(whole[key], halves[key])
            self.assertEqual(*(Path(f"{out}/log.csv").read_text() for out in ("whole", "halves")))
            os.remove("halves/log.csv")  # as if the run had died between its last checkpoint and its log
            module("--out halves --resume --epochs 4")
            self.assertEqual(*(Path(f"{out}/log.csv").read_text() for out in ("whole", "halves")))
            self.assertIn("nowhere", module("--out nowhere --resume", 2))
            self.assertIn("--epochs 3", module("--out halves --resume --epochs 3", 2))

    def test_evaluation_sees_the_test_set_of_training(self):
        """Where a pickle has no split, --eval-only of a run with another seed measures the sequences that run held out."""
        self.write("bare.pkl", pickled(pyskl(20)))
        self.finetune("--data bare.pkl --seed 1 --epochs 1 --out one")
        self.finetune("--ckpt one/finetune.pt --eval-only --out two")
        names = [torch.load(f"{out}/test_outputs.pt", weights_only=True)["names"] for out in ("one", "two")]
        self.assertEqual(*names)

    def test_another_split_of_the_data_is_noted(self):
        """A checkpoint tested or fine-tuned on another split of its data may have seen the test sequences in training."""
        splits = {f"{k}_{half}": [f"a{n}" for n in range(8) if (n // 2 % 2 == k) == (half == "test")]
                  for k in (0, 1) for half in ("train", "test")}
        self.write("two.pkl", pickled({"annotations": pyskl(8), "split": splits}))
        shutil.copy("two.pkl", "other.pkl")
        note = "was trained with another --split"
        for script, name in ((self.pretrain, "pretrain"), (self.finetune, "finetune")):
            self.assertNotIn(note, script("--data two.pkl --split 0 --epochs 1"))
            for line in ("--epochs 1", "--epochs 1 --layout penn13", "--epochs 1 --data other.pkl --split 1"):
                self.assertNotIn(note, self.finetune(f"--ckpt runs/{name}/{name}.pt --out other {line}"))
            self.assertIn(note, self.finetune(f"--ckpt runs/{name}/{name}.pt --out other --epochs 1 --split 1"))
        self.assertIn(note, self.finetune("--ckpt runs/finetune/finetune.pt --eval-only --out other --split 1"))
        self.assertNotIn(note, self.finetune("--ckpt runs/finetune/finetune.pt --eval-only"))

    def test_doubtful_data_are_noted(self):
        """Missing joints without scores, a score as third coordinate, a layout without left and right, a guessed layout, unused labels."""
        def said(x, line=""):
            torch.save({"x_train": [x] * 4, "y_train": [1, 5, 1, 5], "x_test": [x] * 4, "y_test": [1, 5, 1, 5]}, "doubtful.pt")
            return [script(f"--data doubtful.pt --epochs 1 --out doubtful {line}") for script in (self.pretrain, self.finetune)]

        x = torch.rand(8, 1, 25, 3) + 20 * torch.arange(25)[:, None]
        missing, score, centred = (x.clone() for _ in range(3))
        missing[2, :, :5], score[..., 2], centred[:, :, 1] = 0, torch.rand(8, 1, 25), 0
        order = ", ".join(SKELETONS["ntu25"]["joints"])
        for printed in said(x):
            self.assertIn(f"note: ntu25 is a guess from 25 joints in 3D; if yours are not {order}, in this order, give", printed)
            self.assertIn("5 classes (3 of them without a sequence)", printed)
            self.assertEqual(printed.count("note: "), 1)
        for printed in said(x, "--layout ntu25") + said(centred, "--layout ntu25"):
            self.assertNotIn("note: ", printed)
        for printed in said(missing):
            self.assertIn("note: 2 % of the joints are exactly 0 and taken for positions", printed)  # 5 of 8 x 25
        for printed in said(score, "--layout ntu25"):
            self.assertIn("note: the third coordinate is between 0 and 1, the others are not", printed)
        Path("blank.json").write_text(json.dumps(FIVE | {"joints": list("abcde"), "pairs": []}))
        for printed in said(x[:, :, :5], "--layout blank.json"):
            self.assertIn("note: layout blank.json has no left and right", printed)
            self.assertEqual(printed.count("note: "), 1)

    def test_bad_input_is_one_message_and_status_2(self):
        """What a user can get wrong: one short message that names it, no traceback, and every file as it was."""
        self.pretrain(f"{self.data} --epochs 1")
        self.finetune("--ckpt --epochs 1")
        torch.save({**self.content, "y_train": [n % 4 for n in range(25)]}, "four.pt")
        torch.save({**self.content, **{f"x_{h}": [x[..., :2] for x in self.content[f"x_{h}"]] for h in ("train", "test")}}, "flat.pt")
        torch.save({"kind": "finetune"}, "hollow.pt")
        torch.save({**self.content, "x_train": self.content["x_train"][:1], "y_train": [0]}, "one.pt")
        torch.save({**self.content, **{f"y_{h}": [y + 1 for y in self.content[f"y_{h}"]] for h in ("train", "test")}}, "shifted.pt")
        torch.save(torch.load("runs/finetune/finetune.pt", weights_only=True) | {"classes": []}, "classless.pt")
        torch.save([1, 2], "list.pt")
        self.write("splits.pkl", pickled({"annotations": pyskl(), "split": {"a_train": ["a0"], "a_val": ["a1"]}}))
        self.write("text.txt", b"hello"), self.write("hostile.pt", pickled(Made("os.system", "touch ran"), 2))
        self.write("broken.pt", b"PK\3\4 broken")
        def kept():
            return [Path(path).read_bytes() for path in ("runs/pretrain/pretrain.pt", "runs/finetune/finetune.pt", "runs/finetune/log.csv")]

        before = kept()
        pretrain, finetune = self.pretrain, self.finetune
        for module, line, words in (
                (pretrain, "--data absent.npz", ["absent.npz", "expected"]),
                (pretrain, "--data text.txt", ["text.txt"]),
                (pretrain, "--data .", ["."]),
                (pretrain, "--data tiny.pt", ["--layout"]),
                (pretrain, "--data splits.pkl --split xsub", ["xsub", "a_train", "a_val"]),
                (pretrain, f"{self.data} --device tpu", ["device", "tpu"]),
                (finetune, f"{self.data} --device meta", ["device", "meta"]),
                (finetune, f"{self.data} --graphs", ["graphs", "GPU"]),
                (pretrain, "--layout nonsense", ["nonsense"]),
                (pretrain, "--layout five.json", ["five.json", "17"]),
                (pretrain, f"{self.data} --mask-parts right_arm,tail", ["tail"]),
                (pretrain, f"{self.data} --mask-ratio 1", ["ratio"]),
                (pretrain, "--epoch 3", ["--epochs"]),
                (pretrain, f"{self.data} --out text.txt --epochs 1", ["text.txt"]),
                (pretrain, f"{self.data} --out text.txt/deeper --epochs 1", ["text.txt"]),
                (pretrain, f"{self.data} --lr -1", ["--lr"]),
                (finetune, f"{self.data} --lr inf", ["--lr", "inf"]),
                (finetune, f"{self.data} --nesterov --optimizer adamw", ["--nesterov", "expected"]),
                (finetune, f"{self.data} --nesterov --momentum 0", ["--nesterov", "expected"]),
                (finetune, f"{self.data} --device hpu", ["device", "hpu"]),
                (pretrain, f"{self.data} --batch-size {10**20}", ["--batch-size"]),
                (finetune, "--data one.pt --layout five.json --linear-probe", ["--linear-probe", "two"]),
                (finetune, f"{self.data} --optimizer adam", ["--optimizer", "adamw"]),
                (finetune, "--ckpt PRE --data flat.pt --layout five.json", ["2D", "3D"]),
                (finetune, "--ckpt PRE --data splits.pkl --split a", ["five.json", "penn13"]),
                (finetune, "--ckpt PRE --width 16", ["--width"]),
                (finetune, "--ckpt FINE --data four.pt --layout five.json --eval-only", ["3 classes", "4"]),
                (finetune, "--ckpt FINE --data shifted.pt --layout five.json --eval-only", ["[0, 1, 2]", "[1, 2, 3]"]),
                (finetune, "--ckpt classless.pt --eval-only", ["0 classes"]),
                (finetune, "--ckpt text.txt", ["text.txt", "checkpoint"]),
                (finetune, "--ckpt list.pt", ["list.pt"]),
                (finetune, "--ckpt tiny.pt", ["tiny.pt"]),
                (finetune, "--ckpt broken.pt", ["broken.pt"]),
                (finetune, "--ckpt hostile.pt", ["hostile.pt"]),
                (finetune, "--ckpt hollow.pt", ["hollow.pt"]),
                (finetune, "--ckpt absent.pt", ["absent.pt"]),
                (finetune, "--ckpt PRE --eval-only", ["pretrain"]),
                (finetune, "--eval-only", ["--ckpt"]),
                (finetune, "--ckpt --epochs 1 --out text.txt", ["text.txt"])):
            with self.subTest(line):
                message = module(line.replace("PRE", "runs/pretrain/pretrain.pt").replace("FINE", "runs/finetune/finetune.pt"), 2)
                self.assertTrue(all(word in message for word in words), message)
                self.assertTrue(message.startswith("error: ") and "Traceback" not in message)
        with unittest.mock.patch.dict(os.environ, WORLD_SIZE="2"):
            self.assertRegex(finetune(f"{self.data} --device cuda:0", 2), "^error: .*cuda:0 .*2 processes; expected")
        with self.assertRaisesRegex(DataError, "25 training sequences .* 26 processes; expected"):
            train_pretrain.loaders(train_pretrain.Settings(), data.load("tiny.pt", layout="five.json"), torch.device("cpu"), 0, 26)
        self.assertTrue(before == kept())
        self.assertFalse(os.path.exists("ran"))
        os.remove("runs/pretrain/pretrain.pt")
        self.assertIn("train_pretrain.py", self.finetune("--ckpt", 2))

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        """Epoch, step and sequences are named, and the checkpoint of the epoch before stays loadable."""
        for module, name in ((self.pretrain, "pretrain"), (self.finetune, "finetune")):
            message = module(f"{self.data} --lr 1e30 --epochs 5 --repeat 1 --out blown", 2)
            epoch = int(re.search(r"loss is \S+ in epoch (\d+), step 1, sequences train\[\d+\], train", message)[1])
            self.assertGreater(epoch, 1)
            self.assertEqual(torch.load(f"blown/{name}.pt", weights_only=True)["epoch"], epoch - 2)
            losses = [torch.tensor(0.5), torch.tensor(math.nan)]
            for epoch, kept in ((7, "; file of the epoch before is kept"), (0, "")):
                progress = train_pretrain.Progress(9, 2, 0, ["a", "b", "c"], "file", 0, 1)
                progress.start_epoch(epoch, 0.1)
                with self.assertRaisesRegex(train_pretrain.Failure, f"epoch {epoch + 1}, step 2, sequences c, a; try a lower --lr{kept}$"):
                    for loss, index in zip(losses, ([0], [2, 0])):
                        progress.step(loss, torch.tensor(index))
                progress.start_epoch(epoch, 0.1)
                progress.step(losses[0], torch.tensor([1]))
                model = torch.nn.Linear(2, 2)  # its last step can leave weights that no loss has seen
                self.assertEqual(progress.row(model), {"epoch": epoch + 1, "loss": 0.5, "lr": 0.1})
                model.weight.data[0, 1] = math.inf
                with self.assertRaisesRegex(train_pretrain.Failure,
                                            f"weights are not finite in epoch {epoch + 1}, step 1, sequences b; try a lower --lr{kept}$"):
                    progress.row(model)

    def test_rate_is_that_of_training(self):
        """Sequences per second, while an epoch runs and at its end, leave out what is measured and saved after its last step."""
        clock, said = unittest.mock.patch("time.monotonic", side_effect=itertools.count(100)), io.StringIO()
        with clock as clock, contextlib.redirect_stdout(said):
            progress = train_pretrain.Progress(9, 1, 0, list("abcdef"), "file", 0, 1)
            progress.start_epoch(0, 0.1)
            progress.step(torch.tensor(0.5), torch.arange(6))
            begun = progress.epoch_begin
            progress.row(torch.nn.Linear(2, 2))
            spent, clock.side_effect = progress.epoch_end - begun, itertools.count(1000)
            progress.end_epoch(0.5, "")
        self.assertLess(spent, 10)
        self.assertIn(f"{6 / spent:.0f} seq/s", said.getvalue())

    def test_data_and_checkpoint_must_fit(self):
        """Other data than a checkpoint's are refused by what differs: persons, joint scores, edges; and a test of other data does not
        replace the run's own outputs."""
        torch.save({key: [x[:, :1] for x in value] if key.startswith("x") else value for key, value in self.content.items()}, "one.pt")
        shutil.copy("one.pt", "moved.pt")
        self.pretrain(f"--data one.pt --layout five.json --epochs 1{STACK}")
        self.finetune("--ckpt --epochs 1")
        files = [Path("runs", name) for name in ("pretrain/pretrain.pt", "finetune/test_outputs.pt")]
        before = [path.read_bytes() for path in files]
        for line in ("--ckpt --epochs 1", "--ckpt runs/finetune/finetune.pt --eval-only --out other"):
            message = self.finetune(f"{line} {self.data}", 2)
            self.assertTrue("1 person," in message and "the data have 2" in message, message)
        line = "--ckpt runs/finetune/finetune.pt --eval-only --data moved.pt"  # in the layout of the checkpoint
        self.assertIn("--out", self.finetune(line, 2))
        self.assertIn("layout five.json", self.finetune("--ckpt --epochs 1 --data moved.pt --out other"))
        self.assertIn("top-1", self.finetune(f"{line} --out other"))
        self.write("scored.pkl", pickled(pyskl(8, score=[0.5] * 26)))
        self.pretrain("--data scored.pkl --score --epochs 1 --out scored")
        annotations = [{key: value for key, value in a.items() if key != "keypoint_score"} for a in pyskl(8)]
        self.write("unscored.pkl", pickled(annotations))
        self.assertIn("with joint scores", self.finetune("--ckpt scored/pretrain.pt --data unscored.pkl", 2))
        for script, name in ((self.pretrain, "pretrain"), (self.finetune, "finetune")):  # and flags that data leave without effect
            line = f"--data unscored.pkl --score --rotation 60 --out noted/{name}"
            for said in (script(f"{line} --epochs 1"), script(f"{line} --epochs 2 --resume")):
                self.assertTrue("--score does nothing" in said and "--rotation does nothing" in said, said)
        solid = {"x_train": torch.randn(4, 4, 1, 13, 3), "y_train": [0, 1] * 2, "x_test": torch.randn(2, 4, 1, 13, 3), "y_test": [0, 1]}
        torch.save(solid, "solid.pt")  # 2D joints, usually, or a score taken for a coordinate
        for script in (self.pretrain, self.finetune):
            self.assertIn("note: penn13 usually comes in 2D, these data are 3D", script("--data solid.pt --epochs 1 --out solid"))
            self.assertNotIn("usually", script("--data solid.pt --layout penn13 --epochs 1 --out solid"))
            self.assertNotIn("no edges join", script(f"{self.data} --epochs 1 --out loose"))
        Path("five.json").write_text(json.dumps(FIVE | {"edges": [[0, 1]], "joints": ["ro\x1bot", *FIVE["joints"][1:]]}))
        said = self.pretrain(f"{self.data} --epochs 1 --out loose")
        self.assertIn("in layout five.json no edges join 3 of the joints to ro\\x1bot", said)
        self.assertIn("expected the same skeleton", self.pretrain("--resume --epochs 2", 2))
        self.assertEqual([path.read_bytes() for path in files], before)

    def test_outputs_are_those_of_the_run(self):
        """Once a new run has saved its first epoch, the test outputs of the run before in that folder are gone."""
        self.finetune(f"{self.data} --epochs 1")
        with unittest.mock.patch.object(train_finetune, "metrics", side_effect=KeyboardInterrupt):
            self.finetune(f"{self.data} --epochs 1 --seed 1", 130)
        self.assertTrue(os.path.exists("runs/finetune/test_outputs.pt"))
        with unittest.mock.patch.object(train_finetune, "metrics", side_effect=KeyboardInterrupt):
            self.finetune(f"{self.data} --epochs 2 --seed 1 --eval-every 2", 130)
        self.assertFalse(os.path.exists("runs/finetune/test_outputs.pt"))
        self.finetune("--resume")
        self.assertTrue(os.path.exists("runs/finetune/test_outputs.pt"))

    def test_a_sequence_left_over_joins_its_neighbours(self):
        """Batch norm never sees one sequence alone: of 25, with micro-batches of 8, the last pass has nine. The 12 that are held out
        pass in batches of 8 as well."""
        seen, forward = [], SkeletonMAE.forward
        with unittest.mock.patch.object(SkeletonMAE, "forward", lambda self, x, *rest: (seen.append(len(x)), forward(self, x, *rest))[1]):
            self.pretrain(f"{self.data} --epochs 1 --micro-batch 8 --eval-every 9")
        self.assertEqual(seen, [8, 8, 9, 8, 4])

    def test_live_line_fits_the_terminal(self):
        """On a terminal the line is drawn over itself: it fills the terminal's width but for the last column, where it would wrap."""
        for columns in (40, 120):
            size = unittest.mock.patch("shutil.get_terminal_size", return_value=os.terminal_size((columns, 24)))
            with size, contextlib.redirect_stdout(io.StringIO()) as shown:
                progress = train_pretrain.Progress(9, 2, 0, ["a"], "file", 0, 1)
                progress.live, progress.drawn = True, -math.inf
                progress.start_epoch(0, 0.1)
                progress.step(torch.tensor(0.5), torch.tensor([0]))
                progress.end_epoch(0.25, "")
            for line, loss in zip(shown.getvalue().split("\r")[1:], (0.5, 0.25)):
                self.assertTrue(line.startswith(f"epoch 1/9  loss {loss}"))
                self.assertEqual(len(line.rstrip("\n")), max(columns - 1, len(line.rstrip("\n ")) if loss == 0.25 else 0))

    def test_a_failed_write_keeps_the_file(self):
        """Whatever goes wrong while it is written, the old file is whole and no other is left."""
        path = self.write("kept", b"old")
        for where in ("os.fsync", "os.replace"):
            for raised in (OSError(28, "No space left on device"), KeyboardInterrupt()):
                with unittest.mock.patch(where, side_effect=raised), self.assertRaises(type(raised)) as caught:
                    train_pretrain.write_atomically(path, lambda file: file.write(b"new"))
                if isinstance(raised, OSError):
                    self.assertEqual((caught.exception.filename, caught.exception.errno), (path, 28))
                    self.assertIn("No space left on device", caught.exception.strerror)
                self.assertEqual([name for name in os.listdir(self.folder) if name.startswith("kept")], ["kept"])
                self.assertEqual(Path(path).read_bytes(), b"old")
        self.write("kept.123.tmp", b"of a killed run"), self.write("other.tmp", b"a stranger's")
        train_pretrain.write_atomically(path, lambda file: file.write(b"new"))
        self.assertEqual(Path(path).read_bytes(), b"new")
        self.assertEqual(sorted(name for name in os.listdir(self.folder) if "tmp" in name or "kept" in name), ["kept", "other.tmp"])

    def test_as_a_command(self):
        """A normal run of the script prints nothing on stderr, not even torch's remark about numpy."""
        command = [sys.executable, train_pretrain.__file__, *f"{self.data} --epochs 1 {TINY_RUN}".split()]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


# ---------------------------------------------------------------------------------------------- reliability

THOROUGH = "--thorough" in sys.argv  # the counts of the README's reliability section instead of a light version of each


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Damage at a random place, every other time near the beginning or the end, where headers and directories are."""
    position = draw.choice((draw.randrange(len(content)),
                            draw.randrange(min(400, len(content))),
                            len(content) - 1 - draw.randrange(min(400, len(content)))))
    before, after = content[:position], content[position:]
    kind = draw.randrange(7)
    if kind == 0:
        return before + bytes([after[0] ^ 1 << draw.randrange(8)]) + after[1:]
    if kind == 1:
        return before + draw.randbytes(draw.randint(1, 8)) + after[draw.randint(1, 8):]
    if kind == 2:
        return before                                             # truncated
    if kind == 3:
        return before + after[draw.randint(1, 64):]               # a hole
    if kind == 4:
        return before + after[:draw.randint(1, 64)] + after       # a repetition
    if kind == 5:                                                 # length fields
        size = draw.choice((1, 2, 4, 8))
        return before + (draw.choice((0, 1 << 60, (1 << 64) - 1, 1 << 31, 1 << 63)) % (1 << 64)).to_bytes(8, "little")[:size] + after[size:]
    numbers = list(re.finditer(rb"\d+", content[:400])) or [re.match(b"", content)]
    number = draw.choice(numbers)                                 # headers in words
    return content[:number.start()] + draw.choice((b"1152921504606846976", b"0", b"-1", b"99999", b"(" * 900)) + content[number.end():]


def zipped_as_torch(body: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint whose pickle is `body`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in (("data.pkl", body), ("version", b"3"), ("byteorder", b"little")):
            archive.writestr(f"a/{name}", content)
    return file.getvalue()


def peak_memory() -> float:
    """The most memory that this process has had, in MB. Linux's getrusage begins with what the parent process had,
    which would hide much."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def read_mutants(path: str, count: int) -> tuple:
    """Reads `count` damaged copies of a data file or checkpoint, each in under 5 seconds, and expects nothing but data
    or a refusal of one line. Returns (how many were accepted, the slowest in seconds, memory beyond a valid read in MB).
    Run by ReliabilityTest in a process of its own."""
    torch.set_num_threads(1)
    content, out, slowest, accepted = Path(path).read_bytes(), path + ".out", 0.0, 0
    layout = "five.json" if path.endswith("tiny.pt") else None

    def read():
        if "finetune" in path:
            with contextlib.redirect_stdout(io.StringIO()):
                train_finetune.main(["--ckpt", path, "--data", "data.pt", "--layout", "five.json", "--eval-only", "--out", out])
        else:
            source = data.load(path, layout=layout)
            for half in (source.train, source.test):
                for batch in Loader(half, source.skeleton, source.channels, 8, 4, False).epoch():
                    assert batch.x.isfinite().all() and 0 <= int(batch.label.min()) and int(batch.label.max()) < len(source.classes)

    read()
    peak = peak_memory()
    for i in range(count):
        mutant = mutated(content, random.Random(i))
        Path(path).write_bytes(mutant)
        signal.alarm(10)  # a hang ends the process
        begin = time.perf_counter()
        try:
            read()
            accepted += 1
        except (DataError, train_pretrain.Failure, OSError) as error:
            assert "\n" not in str(error), (i, error)
        except Exception as error:
            raise AssertionError(f"mutation {i} of {path}: {error!r}") from error
        slowest = max(slowest, time.perf_counter() - begin)
    signal.alarm(0)
    Path(path).write_bytes(content)
    return accepted, slowest, peak_memory() - peak


class ReliabilityTest(ScriptCase):
    def start(self, module, line: str):
        command = [sys.executable, module.__file__, *f"--device cpu {line}".split()]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})

    def test_killed_at_any_moment(self):
        """kill -9 while training or writing, then --resume: weights, optimiser, log and outputs are those of an undisturbed run,
        bit for bit."""
        draw, line = random.Random(0), f"{self.data} {TINY_RUN} --frames 8 --batch-size 8 --eval-every 1 --epochs 15"
        for module, name in ((train_pretrain, "pretrain"), (train_finetune, "finetune"))[not THOROUGH:]:
            flags = line + " --strl-layers 2 --blocks 1 --milestones 10,13" * (name == "finetune")
            whole = self.start(module, flags + " --out whole")
            whole.stdout.readline()
            begin = time.monotonic()
            self.assertEqual((whole.communicate()[1], whole.returncode), ("", 0))
            lasts = time.monotonic() - begin
            for trial in range(25 if THOROUGH else 1):
                run = self.start(module, f"{flags} --out killed{trial}")
                run.stdout.readline()  # it has read its data
                time.sleep(draw.random() * lasts)
                run.kill()
                run.communicate()
                path = f"killed{trial}/{name}.pt"
                if os.path.exists(path):
                    torch.load(path, weights_only=True)
                again = self.start(module, f"--out killed{trial} --resume" if os.path.exists(path) else f"{flags} --out killed{trial}")
                self.assertEqual(again.communicate()[1], "")
                before, after = (torch.load(f"{out}/{name}.pt", weights_only=True) for out in ("whole", f"killed{trial}"))
                for key in ("model", "optimizer", "log", "epoch"):
                    self.same(before[key], after[key])
                self.assertEqual(*(Path(f"{out}/log.csv").read_text() for out in ("whole", f"killed{trial}")))
                if name == "finetune":
                    self.same(*(torch.load(f"{out}/test_outputs.pt", weights_only=True) for out in ("whole", f"killed{trial}")))
                shutil.rmtree(f"killed{trial}")

    def test_mutated_files(self):
        """Damaged npz, pickle, .pt and checkpoint: no crash, no hang, no traceback, no more than 200 MB;
        what is accepted is a valid data set."""
        self.finetune(f"{self.data} --epochs 1 --out .")
        self.write("a.npz", ctr_gcn()), self.write("b.npz", ctr_gcn(compression=zipfile.ZIP_DEFLATED))
        split = {"train": [f"a{i}" for i in range(4)], "test": ["a4", "a5"]}
        self.write("c.pkl", pickled({"annotations": pyskl(6, score=[1.0] * 26), "split": split}))
        files = {"a.npz": 1000, "b.npz": 1000, "c.pkl": 2000, "tiny.pt": 2000, "finetune.pt": 2000}
        shutil.copy("tiny.pt", "data.pt")  # what the damaged checkpoints are tried on
        for names in [[name] for name in files] if THOROUGH else [list(files)]:  # the peak of a process hides a smaller one after it
            program = (f"import sys; sys.path.insert(0, {os.path.dirname(data.__file__)!r}); import test_skeletonmae as t\n"
                       f"for name in {names}: print(name, *t.read_mutants(name, {files}[name] if {THOROUGH} else 25), flush=True)")
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr[-2000:])
            for line in done.stdout.splitlines():
                name, accepted, slowest, memory = line.split()
                self.assertLess(float(slowest), 5, name), self.assertLess(float(memory), 250, name)
                if THOROUGH:
                    print(f"{name}: {files[name]} mutations, {accepted} accepted, slowest {float(slowest):.2f} s, "
                          f"{float(memory):.0f} MB beyond a valid read", flush=True)

    def test_hostile_checkpoints(self):
        """Checkpoints and .pt data that would run something, as zip and as plain pickle: nothing runs, and what they ask for is named."""
        marker = os.path.join(self.folder, "ran")
        for path, *args in (("os.system", f"touch {marker}"),
                            ("posix.system", f"touch {marker}"),
                            ("builtins.eval", f"open({marker!r}, 'w')"),
                            ("builtins.exec", f"open({marker!r}, 'w')"),
                            ("subprocess.Popen", ["touch", marker]),
                            ("builtins.open", marker, "w"),
                            ("builtins.getattr", Global("os.system"), "__call__"),
                            ("runpy.run_path", marker),
                            ("importlib.import_module", "os"),
                            ("numpy.load", marker),
                            ("torch.load", marker),
                            ("data._Call", "x")):
            body = pickled({"kind": "finetune", "x_train": Made(path, *args)}, 2)
            for content in (body, zipped_as_torch(body)):
                file = self.write("hostile.pt", content)
                with self.subTest(path), self.assertRaisesRegex(DataError, f"it asks for {re.escape(path)}"):
                    train_pretrain.read_checkpoint(file, ("finetune",))
                self.refused(file, "it asks for")
                self.assertFalse(os.path.exists(marker))

    def test_bombs(self):
        """A zip that promises terabytes, lists nested without end, a list that holds itself, and a dict key that doubles
        with every level."""
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976, 300, 150), }".ljust(117) + b"\n"
        huge = b"\x93NUMPY\1\0" + struct.pack("<H", 118) + header
        doubling = b")q\0" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
        self.refused(self.write("padded.npz", zipped(zipfile.ZIP_DEFLATED, x_train=bytes(2**27))), "134217728 bytes", "padding", "np.savez")
        for name, content in (("a.npz", zipped(x_train=huge)),
                              ("b.pkl", b"(" * 200_000 + b"l" * 200_000 + b"."),
                              ("c.pkl", b"]" * 100_000 + b"a" * 99_999 + b"."),
                              ("d.pkl", b"]q\0h\0a."),
                              ("e.pkl", doubling + b"}h\x3cNs."),
                              ("f.pkl", doubling + b"(h\x3cNd."),
                              ("g.pkl", b"\x80\4" + doubling + b"\x8f(h\x3c\x90."),
                              ("h.pkl", b"\x80\4" + doubling + b"}(h\x3cNu."),
                              ("i.npz", zipped(zipfile.ZIP_DEFLATED, x_train=bytes(50_000_000))),
                              ("j.pkl", pickled(ndarray((2**27, "a"), [], dtype("<f4")))),
                              ("k.pkl", b"\x80\5\x96" + struct.pack("<Q", 2**38) + b"."),
                              ("l.pkl", pickled([dict(frame_dir=1 << 20000)]))):
            with self.subTest(name):
                begin = time.monotonic()
                self.refused(self.write(name, content))
                self.assertLess(time.monotonic() - begin, 5)

    def test_few_bytes_unfold_to_no_more_than_they_could_hold(self):
        """Files of a few MB that build, copy, hash or compare one thing again and again, or deflate zeros:
        each is refused in 5 seconds, all in 250 MB."""
        K, long = 1_000_000, struct.Struct("<I").pack
        text, get, put = (lambda s: b"X" + long(len(s)) + s), (lambda i: b"h" + bytes([i])), (lambda i: b"q" + bytes([i]))
        f4 = b"cnumpy\ndtype\n" + text(b"f4") + b"\x85Rq\x09(K\3" + text(b"<") + b"tb"
        function = {name: b"\x80\5cnumpy.core." + name.encode() + b"\n" + put(1) + f4
                    for name in ("multiarray\n_reconstruct", "multiarray\nscalar", "numeric\n_frombuffer")}
        content, four = b"B" + long(K) + b"a" * K + put(0), b"B" + long(104) + raw("<f4", [1.0] * 26) + put(0)
        made = lambda shape: get(1) + b"(" + get(0) + get(9) + shape + text(b"C") + b"tR"
        annotation = b"}(" + text(b"keypoint") + made(b"(K\1K\1K\x0dK\2t") + text(b"label") + b"K\1u" + put(7)
        head = function["numeric\n_frombuffer"]
        one_array = lambda value: (head + b"B" + long(4 * 65_000) + raw("<f4", [value]) * 65_000 + put(0)
                                   + b"](" + annotation.replace(b"(K\1K\1", b"(K\1M\xc4\x09") + get(7) * 20_000 + b"e.")
        doubling = b")q\0" + b"".join(get(i) + get(i) + b"\x86" + put(i + 1) for i in range(60))
        encode = (b"\x80\2" + text(b"a" * K) + put(0) + text(b"latin1") + put(3) + b"c_codecs\nencode\n" + put(1)
                  + b"](" + (get(1) + get(0) + get(3) + b"\x86R") * 2000 + b"e.")
        files = {"encode.pkl": encode,
                 "reconstruct.pkl": function["multiarray\n_reconstruct"] + b"cnumpy\nndarray\n" + put(2) + content
                                    + b"(K\1" + b"J" + long(K // 4) + b"\x85h\x09\x89h\0t" + put(5)
                                    + b"](" + (get(1) + get(2) + b"\x85R" + get(5) + b"b") * 2000 + b"e.",
                 "unbuilt.pkl": function["multiarray\n_reconstruct"] + b"](" + (get(1) + b")R") * K + b"e.",
                 "frombuffer.pkl": head + content + b"](" + made(b"J" + long(K // 4) + b"\x85") * 2000 + b"e.",
                 "scalar.pkl": function["multiarray\nscalar"] + content + b"](" + (get(1) + get(9) + get(0) + b"\x86R") * 200_000 + b"e.",
                 "lists.pkl": b"\x80\2](" + b"]" * 4 * K + b"e.",
                 "marks.pkl": b"\x80\2" + b"(" * 4 * K + b".",
                 "memo.pkl": b"\x80\4N" + b"\x94" * 4 * K + b".",
                 "promised.pkl": b"\x80\5\x96" + struct.pack("<Q", 2**31) + b".",
                 "long key.pkl": b"\x80\2\x8b" + long(K) + b"\x7f" * K + put(0) + b"}(" + (get(0) + b"N") * 300_000 + b"u.",
                 "equal keys.pkl": b"\x80\2" + (text(b"a" * K) + put(0) + text(b"a" * K) + put(1))
                                   + b"}h\0Ns" + (get(1) + b"Ns") * 400_000 + b".",
                 "dtype.pkl": b"\x80\2cnumpy\ndtype\n" + text(b"f" * K) + b"\x85R(K\3" + text(b"<") + b"t" + put(1)
                              + b"b" + (get(1) + b"b") * 300_000 + b".",
                 "shape.pkl": head + four + b"](" + b"K\1" * K + b"e" + put(3) + b"](" + made(get(3)) * 10_000 + b"e.",
                 "one annotation.pkl": head + four + b"](" + annotation + get(7) * 300_000 + b"e.",
                 "one array.pkl": one_array(1.0), "padding.pkl": one_array(0.0),
                 "split.pkl": head + four + b"}(" + text(b"annotations") + b"](" + annotation + get(7) * 3 + b"e"
                              + text(b"split") + b"}(" + text(b"train") + b"](" + b"K\1" * K + b"e"
                              + text(b"test") + b"](K\2euu.",
                 "zeros.npz": zipped(zipfile.ZIP_DEFLATED, x_train=npy("<f4", (K, 1, 20), [], body=bytes(80 * K)))}
        x, nested = torch.zeros(1), [0, 1]
        for _ in range(26):
            nested = [nested, nested]
        good = dict(x_train=[torch.ones(4, 1, 17, 2)], y_train=[0], x_test=[torch.ones(4, 1, 17, 2)], y_test=[0])
        for name, change in (("expanded", {"x_train": x.expand(10**9, 1, 1, 17, 2)}),
                             ("expanded in a list", {"x_train": [x.expand(10**10, 1, 17, 2)]}),
                             ("shared", {"x_train": [torch.ones(1000, 1, 17, 2)] * 10_000, "y_train": [0] * 10_000}),
                             ("nested labels", {"y_train": nested})):
            torch.save(good | change, name + ".pt")
        torch.save(good | {"x_train": torch.zeros(2 * K, 1, 1, 17, 2)}, "stored.pt")
        with zipfile.ZipFile("stored.pt") as stored, zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated:
            for name in stored.namelist():
                deflated.writestr(name, stored.read(name))
        os.remove("stored.pt")
        for name, body in (("encode", encode),
                           ("hash", b"\x80\2" + doubling + b"}h\x3cNs."),
                           ("bytearray", b"\x80\2cbuiltins\nbytearray\nJ\0\0\0\x40\x85R.")):
            files[name + ".pt"] = zipped_as_torch(body)
        # what torch.load takes for a pickle, and for a data.pkl, is what is looked at before
        files["zip at the end.pt"] = b"\x80\2" + doubling + b"}h\x3cNs." + zipped_as_torch(b"\x80\2}.")
        files["capitals.pt"] = files["hash.pt"].replace(b"data.pkl", b"DATA.PKL")
        for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            lying = bytearray(zipped_as_torch(bytes(150_000_000), compression))
            for header, size in ((b"PK\3\4", 22), (b"PK\1\2", 24)):  # where an entry says how long it is
                struct.pack_into("<I", lying, lying.index(header) + size, 1000)
            files[f"lying{compression}.pt"] = bytes(lying)
        names = ([self.write(name, content) and name for name, content in files.items()]
                 + [name for name in os.listdir(".") if name.endswith(".pt") and name not in (*files, "tiny.pt")])
        del files, encode, lying
        program = (f"import resource, signal, sys, time; sys.path.insert(0, {os.path.dirname(data.__file__)!r}); import data\n"
                   "from test_skeletonmae import peak_memory as peak\n"
                   "resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2); before = peak(); signal.alarm(300)\n"
                   "for path in sys.argv[1:]:\n"
                   "    begin, said = time.process_time(), 'accepted'\n"
                   "    try: data.load(path)\n"
                   "    except data.DataError: said = 'refused'\n"
                   "    print(path, said, time.process_time() - begin, peak() - before, sep='|', flush=True)")
        done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr[-2000:])
        self.assertEqual(len(done.stdout.splitlines()), len(names))
        for line in done.stdout.splitlines():
            name, said, seconds_taken, memory = line.split("|")
            self.assertEqual(said, "refused", name)
            self.assertLess(float(seconds_taken), 5, name)
            self.assertLess(float(memory), 250, name)

    def test_damaged_checkpoints(self):
        """What a checkpoint holds is checked when it is read: every part, every setting;
        nothing else than one line and status 2 follows."""
        self.pretrain(f"{self.data} --epochs 1")
        self.finetune("--ckpt --epochs 1")
        pretrained, finetuned = (torch.load(f"runs/{kind}/{kind}.pt", weights_only=True) for kind in ("pretrain", "finetune"))
        os.makedirs("bad")
        for kind, good in (("pretrain", pretrained), ("finetune", finetuned)):
            weight = next(name for name in good["model"] if name.endswith("linear.weight"))
            changes = [{part: bad} for part in good for bad in (None, [[]], torch.ones(2))]
            changes += [{"settings": {**good["settings"], name: bad}}
                        for name, bad in (("width", 10**12), ("frames", "x"), ("data", 3),
                                          ("data", "a\0b"), ("bone", [1]), ("layout", -1))]
            changes += ([{"model": {**good["model"], weight: bad}} for bad in (None, torch.ones(1))]
                        + [{"log": [3]}, {"skeleton": {"joints": 3}}, {"epoch": -1}, {"epoch": -10**20}])
            changes += [{"classes": [torch.ones(2)]}] * (kind == "finetune")
            for change in changes:
                torch.save({**good, **change}, f"bad/{kind}.pt")
                with self.subTest(kind=kind, change=str(change)[:60]):
                    if kind == "pretrain":
                        self.pretrain("--resume --out bad", 2)
                    else:
                        self.finetune("--ckpt bad/finetune.pt --eval-only --out bad", 2)
        self.pretrain(f"{self.data} --epochs 1 {STACK} --out bad")
        stacked = torch.load("bad/pretrain.pt", weights_only=True)
        stacked["model_settings"]["strl"]["heads"] = 0  # the settings, which were checked, decide
        torch.save(stacked, "bad/pretrain.pt")
        self.finetune("--ckpt bad/pretrain.pt --linear-probe --epochs 1 --out bad")
        torch.save({**finetuned, "optimizer": {}}, "bad/finetune.pt")
        self.assertIn("resume with the same", self.finetune("--resume --out bad", 2))
        torch.save({**pretrained, "settings": {**pretrained["settings"], "repeat": 10**12}}, "bad/pretrain.pt")
        self.assertIn("--repeat", self.pretrain("--resume --out bad", 2))
        torch.save({**finetuned, "settings": {**finetuned["settings"], "milestones": (90, -1)}}, "bad/finetune.pt")
        self.assertIn("--milestones", self.finetune("--resume --out bad", 2))

    def test_control_characters_are_never_printed(self):
        """Names in a file that would clear the screen or add lines to a message are escaped, and long ones are cut."""
        evil = "a\x1b[2J\nb"
        for name, content in (("a.pkl", b"\x80\4\x8c\x02os\x8c" + bytes([len(evil)]) + evil.encode() + b"\x93."),
                              ("b.pkl", pickled({"annotations": pyskl(), "split": {evil: []}})),
                              ("c.npz", zipped(**{evil + str(i): b"" for i in range(3000)})),
                              ("d.pkl", pickled([{**a, "frame_dir": evil, "label": -1} for a in pyskl(2)]))):
            with self.assertRaises(DataError) as caught:
                data.load(self.write(name, content))
            self.assertTrue(str(caught.exception).isprintable())
            self.assertIn("\\x1b", str(caught.exception))
            self.assertLess(len(str(caught.exception)), 2500)
        split = {evil + "_train": ["a0"], evil + "_val": ["a1"]}
        self.assertTrue(str(data.load(self.write("e.pkl", pickled({"annotations": pyskl(), "split": split})))).isprintable())
        with self.assertRaises(train_pretrain.Failure) as caught:
            progress = train_pretrain.Progress(9, 2, 0, [evil], "file", 0, 1)
            progress.start_epoch(0, 0.1)
            progress.step(torch.tensor(math.nan), torch.tensor([0]))
        self.assertTrue(str(caught.exception).isprintable())

    def test_full_disk(self):
        """No room for the next checkpoint: one line, status 2, and the checkpoint before is whole."""
        self.pretrain(f"{self.data} --epochs 1")
        before = Path("runs/pretrain/pretrain.pt").read_bytes()
        program = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                   f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)\n"
                   f"sys.path.insert(0, {os.path.dirname(data.__file__)!r}); import train_pretrain; "
                   "train_pretrain.run(lambda: train_pretrain.main(['--resume', '--epochs', '3']))")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
        self.assertIn("runs/pretrain/pretrain.pt", done.stderr)
        self.assertEqual(Path("runs/pretrain/pretrain.pt").read_bytes(), before)
        self.assertEqual(sorted(os.listdir("runs/pretrain")), ["log.csv", "pretrain.pt"])

    def test_folder_removed_while_training(self):
        """The folder comes back with the next checkpoint, which is whole."""
        epochs = []
        def remove(*row):
            epochs.append(row)
            if len(epochs) == 2:
                shutil.rmtree("runs/pretrain")
        with unittest.mock.patch.object(train_pretrain.Progress, "start_epoch", remove), \
                unittest.mock.patch.object(train_pretrain.Progress, "step"), \
                unittest.mock.patch.object(train_pretrain.Progress, "row", return_value={"loss": 0.0}), \
                unittest.mock.patch.object(train_pretrain.Progress, "end_epoch"):
            self.pretrain(f"{self.data} --epochs 3")
        self.assertEqual(torch.load("runs/pretrain/pretrain.pt", weights_only=True)["epoch"], 2)

    def test_names_are_never_paths(self):
        """A frame_dir that climbs out of its folder is a name and nothing else."""
        os.mkdir("inside")
        names = ["../../x", "/etc/passwd", "../climbed", "a\0b"]
        self.write("inside/names.pkl", pickled([{**a, "frame_dir": name} for a, name in zip(pyskl(4), names)]))
        before = sorted(os.listdir("."))
        self.finetune("--data inside/names.pkl --epochs 1 --out inside/run")
        self.assertEqual((sorted(os.listdir(".")), sorted(os.listdir("inside"))), (before, ["names.pkl", "run"]))
        self.assertLessEqual(set(torch.load("inside/run/test_outputs.pt", weights_only=True)["names"]), set(names))

    def test_same_seed_same_bits(self):
        """Two processes with one seed write equal weights, another seed writes others."""
        for out, seed in (("a", 5), ("b", 5), ("c", 6)):
            self.pretrain(f"{self.data} --epochs 2 --seed {seed} --out {out}")
        a, b, c = (torch.load(f"{out}/pretrain.pt", weights_only=True)["model"] for out in "abc")
        self.same(dict(a), dict(b))
        self.assertFalse(torch.equal(a["embedding.linear.weight"], c["embedding.linear.weight"]))

    def test_memory_stays_flat(self):
        """Steps of pre-training on the built-in data: under 20 MB of growth after the first 100."""
        source, model = data.load(synthetic_size=320), SkeletonMAE(COCO, 2, 16, 16)
        optimizer, memory, steps = torch.optim.Adam(model.parameters()), [], 5000 if THOROUGH else 300
        loader, step = Loader(source.train, COCO, 2, 8, 16, True, augmentation=Augmentation(scaling=0.1)), 0
        for epoch in range(-(-steps // loader.steps)):
            for batch in loader.epoch(epoch):
                model(batch.x, batch.present)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
                if (step := step + 1) in (100, steps):
                    memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
        self.assertLess(memory[1] - memory[0], 20)
        if THOROUGH:
            print(f"{steps} steps: {memory[1] - memory[0]:+.1f} MB", flush=True)

    def test_a_killed_process_ends_the_job(self):
        """Of two processes one dies: the other ends with one line, not with a traceback of its own, and the checkpoint loads."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train_pretrain.__file__]
        flags = f"{self.data} {TINY_RUN} --device cpu --frames 8 --batch-size 8 --epochs 100000"
        job = subprocess.Popen(command + flags.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
        while "epoch 3/" not in (line := job.stdout.readline()):
            self.assertTrue(line, "it ended by itself")
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        said = job.communicate(timeout=60)[1]
        self.assertNotEqual(job.returncode, 0)
        self.assertEqual(len(re.findall("(?m)^(error: another process of this job stopped|stopped; )", said)), 1, said)
        self.assertGreaterEqual(torch.load("runs/pretrain/pretrain.pt", weights_only=True)["epoch"], 1)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class GpuTest(ScriptCase):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        precision = torch.get_float32_matmul_precision()
        self.addCleanup(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        self.read = data.load("tiny.pt", layout="five.json")
        shape = dict(width=8, hidden=8, layers=1, motion=True, bone=True, dropout=0.0)
        self.models = (SkeletonMAE(self.read.skeleton, 3, mask_ratio=0.4, **shape),
                       SkeletonClassifier(self.read.skeleton, 3, 3, persons=2, frames=8, strl_layers=2, attention_dropout=0.0, **shape))

    def loader(self, device, **change) -> Loader:
        return Loader(self.read.train.to(device), self.read.skeleton, 3, 8, 8, bool(change), augmentation=data.Augmentation(**change))

    def gradients(self, model, batch, mask) -> list:
        """The loss of one step on the batch's device and the gradient of every parameter."""
        device = batch.x.device
        model, packing = copy.deepcopy(model).to(device), Packing(batch.present, device)
        loss = model(batch.x, packing, mask)[0] if isinstance(model, SkeletonMAE) else F.cross_entropy(model(batch.x, packing), batch.label)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def test_frames_move_once(self):
        """The halves of a pickle share their frames, on the GPU too."""
        shared = data.load(None)
        train, test = train_pretrain.loaders(train_pretrain.Settings(), shared, torch.device("cuda"), 0, 1)
        self.assertTrue(train.data.frames.is_cuda)
        self.assertEqual(train.data.frames.data_ptr(), test.data.frames.data_ptr())

    def test_same_batches_losses_and_gradients(self):
        """What the loader gives, and the loss and every gradient of both models, are those of the CPU."""
        for batch, there in zip(self.loader("cpu").epoch(), self.loader("cuda").epoch()):
            self.assertTrue(there.x.is_cuda)
            torch.testing.assert_close(there.x.cpu(), batch.x, rtol=1e-4, atol=1e-5)
            for model in self.models:
                mask = self.models[0].draw(len(batch.x), 8)
                for ours, plain in zip(self.gradients(model, there, mask), self.gradients(model, batch, mask), strict=True):
                    torch.testing.assert_close(ours.cpu(), plain, rtol=1e-3, atol=1e-4)

    def test_nothing_waits_for_the_gpu(self):
        """Loading, augmenting, packing, both models' steps and the optimiser leave the queue of the GPU running."""
        loaders = (self.loader("cuda", rotation=30, scaling=0.1, shift=0.1, flip=0.5, noise=0.01),
                   self.loader("cuda", rotation=30, crop=0.5), self.loader("cuda", shift=0.1, crop=0.5))
        loaders[-1].data.box = True
        for model in self.models:
            model.cuda()
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
            self.addCleanup(torch.cuda.set_sync_debug_mode, "default")
            for loader in loaders:
                torch.cuda.set_sync_debug_mode("error")
                for batch in loader.epoch():
                    with torch.autocast("cuda", torch.bfloat16):
                        packing = Packing(batch.present, "cuda")
                        loss = (model(batch.x, packing, model.draw(len(batch.x), 8))[0] if isinstance(model, SkeletonMAE) else
                                F.cross_entropy(model(batch.x, packing), batch.label))
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                torch.cuda.set_sync_debug_mode("default")
                self.assertTrue(loss.isfinite())

    def test_graphs(self):
        """A CUDA graph gives the losses and gradients of its step, for every number of persons, and draws dropout anew each time."""
        for model in self.models:
            model.cuda()

            def step(packing, x, label):
                loss = model(x, packing, label > 0)[0] if isinstance(model, SkeletonMAE) else F.cross_entropy(model(x, packing), label)
                loss.backward()
                return loss.detach()

            replay = train_pretrain.Replay(step)
            for i in range(12):
                present = torch.tensor([[True, (n + i) % 6 <= i % 3] for n in range(6)])
                x = torch.randn(6, 2, 8, 5, 3, device="cuda")
                label = (torch.arange(30).view(6, 5) + i) % 3 == 0 if isinstance(model, SkeletonMAE) else (torch.arange(6) + i) % 3
                results = []
                for run in (step, replay):
                    model.zero_grad(set_to_none=False)
                    loss = run(Packing(present, "cuda"), x, label.cuda())
                    results.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
                for ours, plain in zip(*results, strict=True):
                    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
            self.assertEqual([len(replay.recorded), None in replay.recorded.values()], [3, False])
            for name, value in model.named_buffers():
                if name.endswith("num_batches_tracked"):
                    self.assertEqual(int(value), 24, name)  # by the step and by its graph
        model.strl.layers[0].encoder.dropout = 0.5
        replay = train_pretrain.Replay(step)
        self.assertEqual(len({float(replay(Packing(present, "cuda"), x, label.cuda())) for _ in range(4)}), 4)

    def test_graphs_train_alike(self):
        """With CUDA graphs and without, both scripts log the same losses: gradients add up over micro-batches and start from zero."""
        for run, flags in ((self.pretrain, "--micro-batch 4 --lr 0.01"), (self.finetune, "--clip 5")):
            losses = []
            for graphs in ("graphs", "no-graphs"):
                run(f"{self.data} --device cuda --no-amp --epochs 6 --batch-size 8 {flags} --{graphs} --out {run.__name__}-{graphs}")
                with open(f"{run.__name__}-{graphs}/log.csv", newline="") as file:
                    losses.append(torch.tensor([float(row["loss"]) for row in csv.DictReader(file)]))
            torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)

    def test_scripts(self):
        """Both scripts run on it, in bfloat16, and go on from their checkpoints; one that was written there is read without it."""
        self.assertIn("on cuda:0 in bfloat16", self.pretrain(f"{self.data} --device auto --epochs 1"))
        self.assertIn("epoch 3/3", self.pretrain("--device cuda --resume --epochs 3"))
        self.assertIn("on cuda:0", self.finetune("--ckpt --device cuda:0 --epochs 2 --batch-size 8"))
        self.assertIn("epoch 3/3", self.finetune("--device cuda --resume --epochs 3"))
        self.assertIn("top-1", self.finetune("--ckpt runs/finetune/finetune.pt --eval-only"))


class DependencyTest(unittest.TestCase):
    def test_torch_and_the_standard_library_alone(self):
        """No file at top level imports anything but torch, the standard library and its neighbours;
        numpy stays out, unless torch brings it."""
        folder = os.path.dirname(data.__file__)
        own = {name[:-3] for name in os.listdir(folder) if name.endswith(".py")}
        for name in sorted(own):
            tree = ast.parse(Path(folder, name + ".py").read_text())
            modules = ([a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
                       + [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)])
            imported = {module.split(".")[0] for module in modules}
            self.assertLessEqual(imported, sys.stdlib_module_names | own | {"torch"}, name)
        self.assertEqual(str("numpy" in sys.modules), child("import sys, torch; print('numpy' in sys.modules)"))


# ---------------------------------------------------------------------------------------------- figures

def write_checkpoint(folder: str, kind: str, settings: dict, model: dict, model_settings: dict):
    os.makedirs(folder, exist_ok=True)
    log = [{"epoch": e, "loss": 1 / e, "lr": 0.1, "top1": 9.0 * e} for e in (1, 2)]
    train_pretrain.save({"kind": kind, "settings": settings, "model": model, "model_settings": model_settings,
                         "optimizer": {}, "epoch": 1, "log": log, "skeleton": SKELETONS["coco17"], "layout": "coco17",
                         "channels": 2, "persons": 1, "classes": [0], "pretrained": [], "score": False},
                        os.path.join(folder, kind + ".pt"))


def make_run(folder: str, K: int = 5, N: int = 60, pretrained: str = ""):
    """What train_finetune.py leaves, with random numbers; class 1 has no test sequence."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(K, (N,), generator=generator)
    labels[labels == 1] = 0
    outputs = {"logits": torch.randn(N, K, generator=generator), "features": torch.randn(N, 16, generator=generator), "labels": labels,
               "classes": list(range(K)), "names": [f"s{i}" for i in range(N)], "train_counts": torch.arange(K) * 3 + 1,
               "metrics": {"top1": 50.0, "top5": 90.0, "mean_class": 40.0}}
    settings = {"ckpt": pretrained, "data": "", "split": "", "label_fraction": 1.0, "linear_probe": False}
    write_checkpoint(folder, "finetune", settings, {}, {})
    torch.save(outputs, os.path.join(folder, "test_outputs.pt"))
    return outputs


def draw(*words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        visualize.main(list(words))
    return said.getvalue()


@unittest.skipUnless(visualize, "visualize.py is optional and not here")
class FigureNumberTest(unittest.TestCase):
    def test_pca_is_the_eigen_decomposition(self):
        """Coordinates and explained shares agree with torch.linalg.eigh of the covariance, up to sign."""
        x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.tensor([5., 3., 2., 1., .5, .1])) + 7
        points, share = visualize.pca(x, 3)
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        for k in range(3):
            expected = (x - x.mean(0)) @ vectors[:, -1 - k]
            expected = expected * torch.sign(expected @ points[:, k])
            torch.testing.assert_close(points[:, k], expected, atol=2e-3, rtol=1e-3)
            self.assertAlmostEqual(float(share[k]), float(values[-1 - k] / values.sum()), places=4)

    def test_perplexity_is_reached(self):
        """exp(entropy) of every row of the affinities, summed in a loop, is the perplexity asked for."""
        x = torch.randn(120, 8, generator=torch.Generator().manual_seed(2)) * 4 + 3
        for wanted in (5.0, 30.0):
            p = visualize.affinities(x, wanted)
            for row in p:
                entropy = -sum(v * math.log(v) for v in row.tolist() if v > 0)
                self.assertAlmostEqual(math.exp(entropy), wanted, delta=0.01 * wanted)
            self.assertEqual(float(p.diagonal().abs().max()), 0)

    def test_tsne_separates_three_blobs(self):
        """Three Gaussian blobs end up apart, every nearest neighbour of one's own blob, and the divergence falls."""
        generator = torch.Generator().manual_seed(3)
        label = torch.arange(3).repeat_interleave(30)
        x = torch.randn(90, 10, generator=generator) + 12 * torch.eye(3, 10)[label]
        y, divergence = visualize.tsne(x, perplexity=12, iterations=350, early=100)
        self.assertLess(divergence[-1], 0.5 * divergence[0])
        self.assertTrue(all(a + 0.01 > b for a, b in zip(divergence[3:], divergence[4:])), divergence)
        q = 1 / (1 + torch.cdist(y, y) ** 2)
        p, q = visualize.affinities(x, 12), q.fill_diagonal_(0) / q.fill_diagonal_(0).sum()
        p = ((p + p.T) / 180).clamp(min=1e-12)
        self.assertAlmostEqual(divergence[-1], float((p * (p / q.clamp(min=1e-12)).log()).sum()), places=3)
        distance = torch.cdist(y, y).fill_diagonal_(math.inf)
        same = label[:, None] == label
        self.assertTrue((label[distance.argmin(1)] == label).all())
        self.assertLess(float(distance[same & distance.isfinite()].mean()), 0.5 * float(distance[~same].mean()))

    def test_confusion_and_class_accuracy_against_loops(self):
        """Counts against two loops, their sum is the test set; Fig. 2 says each class's accuracy, without one for a class without
        sequences, and their mean and spread."""
        generator = torch.Generator().manual_seed(4)
        labels, predicted = (torch.randint(5, (300,), generator=generator) for _ in range(2))
        labels[labels == 2] = 4
        counts = visualize.confusion(labels, predicted, 5)
        expected = [[sum(int(t == i and p == j) for t, p in zip(labels.tolist(), predicted.tolist())) for j in range(5)] for i in range(5)]
        self.assertEqual(counts.tolist(), expected)
        self.assertEqual(int(counts.sum()), 300)
        accuracy = {c: 100 * expected[c][c] / sum(expected[c]) for c in (0, 1, 3, 4)}
        _, _, caption, svg = visualize.fig2({"run": counts}, [f"class {c}" for c in range(5)], list("01234"))
        order = sorted(accuracy, key=accuracy.get, reverse=True)
        self.assertEqual(re.findall(r"<title>class (\d): ([\d.]+) %", svg), [(str(c), f"{accuracy[c]:.1f}") for c in order])
        self.assertIn(f"average {stats.mean(accuracy.values()):.1f} %, spread ±{stats.pstdev(accuracy.values()):.1f} points", svg)
        self.assertIn("Left out: 1 ", caption)


@unittest.skipUnless(visualize, "visualize.py is optional and not here")
class FigureTest(Case):
    def test_names_are_escaped_and_clipped_in_well_formed_files(self):
        """5, 60 and 120 classes of hostile names, one without test sequences: XML that parses, nothing loaded from elsewhere."""
        for K in (5, 60, 120):
            make_run(self.folder, K, 4 * K)
            names = os.path.join(self.folder, "names.txt")
            with open(names, "w") as file:
                file.write("\n".join(f"<b>\"{i}' & \x01" + "W" * 90 for i in range(K)))
            draw(self.folder, "--class-names", names, "--no-tsne" if K > 5 else "--tsne", "--compare", self.folder, "--table", self.folder)
            files = glob.glob(os.path.join(self.folder, "*.svg"))
            self.assertEqual(len(files), 8 if K == 5 else 7, files)
            for path in files:
                shown = [e.text or "" for e in ElementTree.parse(path).iter() if e.tag.rpartition("}")[2] in ("text", "title")]
                self.assertTrue(shown and all("W" * 60 not in words and len(words) <= 140 for words in shown), path)
                if path.endswith("confusion.svg"):
                    self.assertIn("<b>\"0' & ", " ".join(shown))
            with open(os.path.join(self.folder, "report.html"), encoding="utf-8") as file:
                page = file.read()
            self.assertNotIn("<b>", page)
            self.assertNotRegex(page, r"https?:|<link|\bsrc=|@import|url\(")
            total = sum(int(count) for count in re.findall(r": (\d+) of \d+ taken for", page))
            self.assertEqual(total, 4 * K)  # hovering counts every test sequence once

    def test_reconstruction_of_a_pretraining(self):
        """Eight frames three times over, a ring at each masked joint, their mean error as pre-training measures it (paper Fig. 6)."""
        was = train_pretrain.Settings(width=8, hidden=8, layers=1, frames=8, synthetic_size=32, out=self.folder + "/pre")
        shape = dict(skeleton=SKELETONS["coco17"], channels=2, width=8, hidden=8, layers=1)
        model = SkeletonMAE(**shape)
        write_checkpoint(was.out, "pretrain", vars(was), model.state_dict(), shape)
        checkpoint = os.path.join(was.out, "pretrain.pt")
        make_run(self.folder, pretrained=checkpoint)
        draw(self.folder, "--no-tsne", "--sequence", "3", "--table", self.folder)
        for wanted in ("1000", "9" * 5000, "nobody"):
            with self.assertRaisesRegex(train_pretrain.Failure, "no test sequence"):
                draw(self.folder, "--no-tsne", "--sequence", wanted)
        figure = ElementTree.parse(os.path.join(self.folder, "paper-fig6-reconstruction.svg")).getroot()
        self.assertEqual(sum(e.tag.endswith("}svg") for e in figure.iter()), 1 + 3 * 8)
        rings = sum(e.get("d").count("M") for e in figure.iter() if e.get("class") == "joint ring")
        self.assertIn(rings, (4 * 8, 2 * 4 * 8))  # right arm and right leg, four joints, of one or two persons in eight frames
        one = Loader(train_pretrain.read_data(was).test.subset([3]), SKELETONS["coco17"], 2, 1, 8, False)
        error = train_pretrain.reconstruction_error(model, one, torch.zeros(2, 17, 2))["joint_error"]
        self.assertIn(f"Mean error of its masked joints: {error:.3g} in the units of the data",
                      Path(self.folder, "report.html").read_text())

    def test_table_2(self):
        """The best and the worst set of as many joints, the mean and the deviation over runs, and a dash where there is none."""
        runs = {"a": {}, "b": {}, "c": {"mask_parts": ("left_arm", "left_leg")}, "d": {"mask_ratio": 4 / 17}, "e": None}
        for i, (name, how) in enumerate(runs.items()):
            folder = os.path.join(self.folder, name)
            if how is not None:
                was = vars(train_pretrain.Settings(**how))
                write_checkpoint(folder + "-pre", "pretrain", was, {}, {})
            outputs = make_run(folder, pretrained="" if how is None else folder + "-pre/pretrain.pt")
            torch.save(outputs | {"metrics": outputs["metrics"] | {"top1": 80.0 + i * i}}, os.path.join(folder, "test_outputs.pt"))
        os.makedirs(os.path.join(self.folder, "eval-only"))
        torch.save(outputs, os.path.join(self.folder, "eval-only", "test_outputs.pt"))
        other = os.path.join(self.folder, "other")  # other data of the same name: a table of their own
        torch.save(make_run(other) | {"labels": 0 * outputs["labels"]}, os.path.join(other, "test_outputs.pt"))
        draw(os.path.join(self.folder, "e"), "--table", *sorted(glob.glob(self.folder + "/?*")), "--no-tsne", "--out", self.folder)
        content = Path(self.folder, "report.html").read_text().partition("Table 2")[2].partition("</table>")[0]
        rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in content.split("<tr>")[1:]]
        arm, leg, right_arm, right_leg = (list(SKELETONS["coco17"]["parts"]).index(part)
                                          for part in ("left_arm", "left_leg", "right_arm", "right_leg"))
        high, low = (" ".join(f"V{i}" for i in sorted(pair)) for pair in ((arm, leg), (right_arm, right_leg)))
        self.assertEqual(rows, [["Masked joints", "0", "4"],
                                ["Ratio", "0 %", "24 %"],
                                ["No pre-training", "96.0 ", "–"],
                                ["Random joints", "–", "89.0 "],
                                ["Body parts, high", "–", f"84.0 {high}"],
                                ["Body parts, low", "–", f"80.5 ± 0.7 (n = 2) {low}"]])

    def test_what_an_earlier_report_left_is_removed(self):
        """A figure that is not drawn this time does not stay beside the report; other files do, and the line printed says so."""
        make_run(self.folder)
        Path(self.folder, "own.svg").write_text("<svg/>")
        self.assertNotIn("removed", draw(self.folder))
        before = {path.name for path in Path(self.folder).glob("*.svg")}
        self.assertEqual({name[:-4] for name in before} - {"own"},
                         visualize.FIGURES.keys() - {"paper-fig6-reconstruction", "training-pretrain"})
        self.assertRegex(draw(self.folder, "--no-tsne"), r"removed .*: fig1-tsne\.svg$")
        self.assertEqual(before - {path.name for path in Path(self.folder).glob("*.svg")}, {"fig1-tsne.svg"})

    def test_classes_are_named_or_drawn_from_the_rarer_half(self):
        """Table 1 lists ids, sequences and names of the classes asked for; else of five that are among the rarer half, by the seed."""
        outputs = make_run(self.folder, 24, 480)
        Path(self.folder, "names.txt").write_text("\n".join(f"name {i}" for i in range(24)), encoding="utf-8-sig")  # as Windows writes it
        rows = []
        for words in (["--classes", "name 7,0"], ["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
            draw(self.folder, "--no-tsne", "--class-names", os.path.join(self.folder, "names.txt"), *words)
            content = Path(self.folder, "report.html").read_text().partition("Table 1")[2].partition("</table>")[0]
            rows.append([re.findall("<td>(.*?)</td>", row) for row in content.split("<tr>")[2:]])
        self.assertEqual(rows[0], [[str(c), str(3 * c + 1), str(int((outputs["labels"] == c).sum())), f"name {c}"] for c in (7, 0)])
        for drawn in rows[1:]:  # training sequences grow with the id, and class 1 is not tested: 0 to 11 are the rarer half
            self.assertEqual(len({int(row[0]) for row in drawn} & set(range(12))), 5)
        self.assertTrue(rows[1] == rows[2] != rows[3])

    def test_bad_input_names_the_command_that_mends_it(self):
        """What is missing or broken is one line with the command that makes it, exit status 2, and no report."""
        def refused(pattern, *words):
            done = subprocess.run([sys.executable, visualize.__file__, *words], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout, len(done.stderr.splitlines())), (2, "", 1), done.stderr)
            self.assertRegex(done.stderr, pattern)

        refused(r"missing; make it with: python train_finetune\.py --out \S*nothing", os.path.join(self.folder, "nothing"))
        outputs = make_run(self.folder, pretrained=os.path.join(self.folder, "gone", "pretrain.pt"))
        with self.assertRaisesRegex(train_pretrain.Failure, r"missing; make it with: python train_pretrain\.py --out \S*gone"):
            draw(self.folder)
        with self.assertRaisesRegex(train_pretrain.Failure, "or leave its figures out: --pretrained none"):
            draw(self.folder)
        with self.assertRaisesRegex(train_pretrain.Failure, "is no checkpoint; expected a pretrain.pt"):
            draw(self.folder, "--pretrained", os.path.join(self.folder, "log.csv"))
        for change in ({"features": outputs["features"][:, 0]}, {"features": outputs["features"][:, :0]}, {"train_counts": [1] * 5}):
            torch.save(outputs | change, os.path.join(self.folder, "test_outputs.pt"))
            with self.assertRaisesRegex(train_pretrain.Failure, "test_outputs.pt cannot be used"):
                draw(self.folder, "--pretrained", "none")
        nested = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))  # its hash takes 2^60 steps
        self.write("test_outputs.pt", zipped_as_torch(b"\x80\2" + nested + b"}h\x3cNs."))
        with self.assertRaisesRegex(train_pretrain.Failure, "test_outputs.pt cannot be used"):
            draw(self.folder, "--pretrained", "none")
        make_run(self.folder, pretrained=os.path.join(self.folder, "gone", "pretrain.pt"))
        for row in ("nan,1", "1,inf"):
            Path(self.folder, "log.csv").write_text(f"epoch,loss\n{row}\n")
            with self.assertRaisesRegex(train_pretrain.Failure, "log.csv cannot be used .*finite"):
                draw(self.folder, "--pretrained", "none")
        make_run(self.folder, pretrained=os.path.join(self.folder, "gone", "pretrain.pt"))
        with self.assertRaisesRegex(train_pretrain.Failure, "no class 77"):
            draw(self.folder, "--pretrained", "none", "--classes", "77")
        for name in ("test_outputs.pt", "finetune.pt", "log.csv"):
            make_run(self.folder)
            with open(os.path.join(self.folder, name), "w") as file:
                file.write("broken")
            with self.assertRaisesRegex(train_pretrain.Failure, rf"{re.escape(name)} cannot be used .*train_finetune\.py --out"):
                draw(self.folder, "--no-tsne")
        make_run(self.folder)
        torch.save(outputs | {"labels": outputs["labels"] + 3}, os.path.join(self.folder, "test_outputs.pt"))
        with self.assertRaisesRegex(train_pretrain.Failure, "labels from 0 to 4"):
            draw(self.folder)
        torch.save(outputs | {"metrics": {"top1": "high"}}, os.path.join(self.folder, "test_outputs.pt"))
        with self.assertRaisesRegex(train_pretrain.Failure, "cannot be used"):
            draw(self.folder)
        make_run(self.folder)
        checkpoint = torch.load(os.path.join(self.folder, "finetune.pt"), weights_only=True)
        torch.save(checkpoint | {"settings": checkpoint["settings"] | {"epochs": "many"}}, os.path.join(self.folder, "finetune.pt"))
        with self.assertRaisesRegex(train_pretrain.Failure, "--epochs"):
            draw(self.folder)
        path = os.path.join(self.folder, "finetune.pt")
        torch.save(checkpoint | {"settings": checkpoint["settings"] | {"ckpt": path}}, path)
        self.assertIsNone(visualize.read_pretraining(path))  # it was fine-tuned again in its own folder
        self.assertEqual(glob.glob(os.path.join(self.folder, "report.html")), [])

    def test_nothing_imports_it(self):
        """visualize.py can be deleted: no other script imports it."""
        for path in Path(__file__).parent.glob("*.py"):
            if not path.name.startswith("test"):
                self.assertNotRegex(path.read_text(), r"(?m)^\s*(import|from) visualize", path)


# ---------------------------------------------------------------------------------------------- how fast it is

def seconds(work, repeats: int = 9) -> float:
    """Median time of work(), after two warm-ups."""
    taken = []
    for i in range(repeats + 2):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return stats.median(taken[2:])


def training_step(model, optimizer, loss, amp: bool = False):
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            error = loss()
        error.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.train()
    return step


def pretraining_step(N: int = 64, T: int = 64, M: int = 1, hidden: int = 256, amp: bool = False):
    model, x = SkeletonMAE(COCO, 2, hidden=hidden), torch.randn(N, M, T, 17, 2)
    return training_step(model, torch.optim.Adam(model.parameters(), 1.5e-4), lambda: model(x)[0], amp)


def finetuning_step(N: int = 16, T: int = 64, M: int = 2, compiled: bool = False):
    model, x, y = SkeletonClassifier(COCO, 2, 60, persons=2), torch.randn(N, 2, T, 17, 2), torch.arange(N) % 60
    x[:, M:] = 0
    call, present = torch.compile(model, dynamic=True) if compiled else model, x.flatten(2).any(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    return training_step(model, optimizer, lambda: F.cross_entropy(call(x, Packing(present, "cpu")), y))


def matrix_limit() -> float:
    """FLOP a second of a matrix product, the shapes of P1's widest layer."""
    a, b = torch.randn(69632, 256), torch.randn(256, 256)
    return 2 * a.numel() * 256 / seconds(lambda: a @ b)


def of_limit(step, time_taken: float) -> str:
    with FlopCounterMode(display=False) as counter:
        step()
    return f"{100 * counter.get_total_flops() / time_taken / matrix_limit():.0f} % of the matrix-product limit"


def child(program: str) -> str:
    """What a Python program prints; it runs in a process of its own, beside the scripts."""
    return subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent,
                          capture_output=True, text=True, check=True).stdout.strip()


def speed(rows: list):
    """The rows of the README's speed table that a CPU can measure; rows: some of them, as P1 P4, or none for all."""
    train_pretrain.keep_freed_memory()
    torch.manual_seed(0)

    def show(row: str, what: str):
        print(f"{row}  {what}", flush=True)

    def wanted(row: str) -> bool:
        return not rows or row in rows

    if wanted("P1"):
        step = pretraining_step()
        taken = seconds(step)
        show("P1", f"pre-training step, 64 sequences x 64 frames x 17 joints, 3 x 256: {64 / taken:.1f} sequences/s, "
                   f"{of_limit(step, taken)}")
    if wanted("P2"):
        show("P2", f"the same in bfloat16: {64 / seconds(pretraining_step(amp=True), 3):.1f} sequences/s")
    if wanted("P3"):
        step = finetuning_step()
        taken = seconds(step)
        show("P3", f"fine-tuning step, 16 sequences x 2 persons x 64 frames x 17 joints: {16 / taken:.1f} sequences/s, "
                   f"{of_limit(step, taken)}")
    if wanted("P4"):
        with tempfile.TemporaryDirectory() as folder:
            write_ntu(f"{folder}/ntu.npz", 1024)
            read = data.load(f"{folder}/ntu.npz")
            augment = train_pretrain.augmentation(train_pretrain.Settings(), 3)
            for batch in (1024, 128):
                loader = Loader(read.train, read.skeleton, 3, batch, 64, True, augmentation=augment)
                taken = seconds(lambda: sum(1 for _ in loader.epoch())) / 1024
                show("P4", f"a training sample of NTU's shape, augmented, batch {batch}: {1000 * taken:.4f} ms")
    if wanted("P5"):
        with tempfile.TemporaryDirectory() as folder:
            write_ntu(f"{folder}/ntu.npz", 40091)
            show("P5", child(f"""
import time; begin = time.perf_counter()
import train_pretrain, data
train_pretrain.keep_freed_memory()
read = data.load({f"{folder}/ntu.npz"!r})
next(iter(data.Loader(read.train, read.skeleton, 3, 256, 64, True).epoch()))
anonymous = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")][0]
print(f"from the start of Python to the first batch of 7.2 GB: {{time.perf_counter() - begin:.1f}} s, "
      f"{{int(anonymous) / 1e6:.2f}} GB of anonymous memory")
"""))
    if wanted("P6"):
        with tempfile.TemporaryDirectory() as folder:
            line = [train_pretrain.__file__, "--synthetic-size", "1280", "--epochs", "1", "--out", folder]
            peak = os.wait4(subprocess.Popen([sys.executable, *line], stdout=subprocess.DEVNULL).pid, 0)[2].ru_maxrss
        show("P6", f"peak memory of an epoch of pre-training, batch 1024, micro-batch 256, 64 frames x 17 joints: {peak / 1e6:.2f} GB")
    if wanted("P7"):
        model = SkeletonClassifier(COCO, 2, 60).eval()
        one, many = torch.randn(1, 1, 64, 17, 2), torch.randn(64, 1, 64, 17, 2)
        with torch.inference_mode():
            show("P7", f"inference: one sequence of one person {1000 * seconds(lambda: model(one), 50):.1f} ms; batches of 64 "
                       f"{64 / seconds(lambda: model(many)):.0f} sequences/s")
            with torch.autocast("cpu", torch.bfloat16):
                show("P7", f"the same in bfloat16: {64 / seconds(lambda: model(many)):.0f} sequences/s")
    if wanted("P8"):
        for what, step, base in (("sequences", lambda k: finetuning_step(8 * k, 64, 1), 8),
                                 ("frames", lambda k: finetuning_step(16, 32 * k, 1), 32),
                                 ("persons", lambda k: finetuning_step(16, 64, k), 1)):
            factors = (1, 2) if what == "persons" else (1, 2, 4, 8)
            steps = [step(k) for k in factors]
            taken = [stats.median(t) for t in zip(*([seconds(s, 3) for s in steps] for _ in range(5)))]  # interleaved
            show("P8", f"cost per unit at {', '.join(f'{k * base}' for k in factors)} {what}, relative to the first: "
                       + ", ".join(f"{t / k / taken[0]:.2f}" for t, k in zip(taken, factors)))
    if wanted("compile"):
        begin = time.perf_counter()
        step = finetuning_step(compiled=True)
        step()
        warm_up = time.perf_counter() - begin
        show("compile", f"fine-tuning step of P3, compiled: {16 / seconds(step):.1f} sequences/s after {warm_up:.0f} s of warm-up")


# ---------------------------------------------------------------------------------------------- running them

class Result(unittest.TextTestResult):
    """Counts whole tests: one with several failing sub-tests failed once."""

    def line(self) -> str:
        failed = {getattr(test, "test_case", test).id() for test, _ in self.failures + self.errors}
        return f"{self.testsRun - len(failed) - len(self.skipped)} passed, {len(failed)} failed, {len(self.skipped)} skipped"


class Runner(unittest.TextTestRunner):
    resultclass = Result


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if "--speed" in sys.argv:
        sys.exit(speed([row for row in sys.argv[1:] if row != "--speed"]))
    result = unittest.main(exit=False, testRunner=Runner, argv=[word for word in sys.argv if word != "--thorough"]).result
    print(result.line(), flush=True)
    sys.exit(not result.wasSuccessful())
