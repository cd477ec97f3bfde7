"""Tests: every equation, reader and script against an independent plain implementation.

    python test_skeletonmae.py               # all, a minute or two on one idle core
    python test_skeletonmae.py MaskTest      # one class, or one test: MaskTest.test_ratio

Needs torch and this folder alone. Order: the model, the data, the scripts. "S" is the paper's
supplement, "ours" what was chosen where the paper is silent. Shapes as in skeletonmae.py."""
import base64
import contextlib
import copy
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from unittest.mock import patch

import data  # before torch: it silences torch's one remark about numpy
import skeletonmae
import train_finetune
import train_pretrain
import torch
import torch.nn.functional as F
from data import Augmentation, DataError, Loader
from skeletonmae import (SKELETONS, AttentionBlock, GraphConvolution, GraphEncoder,
                         JointEmbedding, LinearProbe, Packing, SkeletonClassifier, SkeletonMAE,
                         TemporalPooling, bone_parents, draw_mask, make_skeleton,
                         normalized_adjacency, reweighted_cosine_error)

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)

FOLDER = Path(skeletonmae.__file__).parent
COCO = SKELETONS["coco17"]
STAR = make_skeleton(  # a user's own skeleton
    "hip chest head left_hand right_hand", [(0, 1), (1, 2), (1, 3), (1, 4)],
    {"trunk": [0, 1], "head": [2], "left": [3], "right": [4]}, centre=0)
STAR_PARENTS = [0, 0, 1, 1, 1]
SMALL = dict(width=8, hidden=8, layers=2)
tiny_mae = partial(SkeletonMAE, STAR, 2, mask_parts=["left"], **SMALL)
tiny_classifier = partial(
    SkeletonClassifier, **SMALL, strl_layers=2, blocks=1, heads=2, frames=6)

def grid(*sizes):
    return product(*map(range, sizes))

def python(*words: str, **environment):
    """Another Python that may import this folder's modules: what it printed, and its status."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(FOLDER)) | environment
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)

class Case(unittest.TestCase):
    """A test in a temporary folder of its own, with one seed."""
    def setUp(self):
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def write(self, name: str, content: bytes) -> str:
        Path(name).write_bytes(content)
        return name

    def read(self, name: str, content: bytes, **options):
        return data.load(self.write(name, content), **options)

    def refused(self, name: str, content: bytes, words: str):
        """Reading it raises a DataError of one line that holds these words, a regex."""
        with self.subTest(words), self.assertRaisesRegex(DataError, rf"\A.*{words}.*\Z"):
            self.read(name, content)

# ------------------------------------------------------------------------------ the model

def plain_batch_norm(norm, x):
    x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    return x * norm.weight + norm.bias

def plain_layer_norm(norm, x):
    variance = x.var(-1, correction=0, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

def plain_graph_layer(layer, h, edges, training=False):
    """S Eq. 1, joint by joint: h (V, ..., in) -> (V, ..., out)."""
    degree = [1 + sum(v in edge for edge in edges) for v in range(len(h))]
    rows = [h[v] / degree[v] for v in range(len(h))]
    for i, j in [*edges, *(edge[::-1] for edge in edges)]:
        rows[i] = rows[i] + h[j] / math.sqrt(degree[i] * degree[j])
    z = torch.stack(rows) @ layer.linear.weight.T
    norm = layer.norm
    normed = F.batch_norm(
        z.flatten(0, -2), norm.running_mean, norm.running_var, norm.weight, norm.bias, training)
    return F.prelu(normed.view(z.shape), layer.activation.weight)

def plain_attention(attention, g):
    """softmax(Q K^T / sqrt(d)) V of one person, head by head: (T, H) -> (T, H)."""
    width = g.shape[-1] // attention.heads
    parts = [part.split(width, 1) for part in attention.query_key_value(g).chunk(3, 1)]
    heads = []
    for query, key, value in zip(*parts):
        scores = torch.exp(query @ key.T / math.sqrt(width))
        heads.append(scores / scores.sum(1, keepdim=True) @ value)
    return attention.project(torch.cat(heads, 1))

def plain_attention_block(block, g):
    norm, widen, _, narrow, _ = block.feed_forward
    g = g + plain_attention(block, plain_layer_norm(block.norm, g))
    return g + narrow(F.gelu(widen(plain_layer_norm(norm, g))))

def plain_pooling(pool, h, stride):
    """The four branches (ours), frame by frame: (V, T, D) -> (V, ceil(T / stride), D)."""
    T = h.shape[1]
    B = h.shape[2] // 4
    x = plain_batch_norm(pool.reduce_norm, h @ pool.reduce.weight.T).relu()

    def three_frames(t, channels, dilation, branch):
        weights = branch.weight.split(B, 1)
        return sum(x[:, t + dilation * k, channels] @ weights[k + 1].T
                   for k in (-1, 0, 1) if 0 <= t + dilation * k < T)

    frames = []
    for t in range(0, T, stride):
        near = three_frames(t, slice(0, B), 1, pool.near)
        far = three_frames(t, slice(B, 2 * B), 2, pool.far)
        largest = x[:, max(t - 1, 0):t + 2, 2 * B:3 * B].amax(1)
        joined = torch.cat([near, far, largest, x[:, t, 3 * B:]], 1)
        frames.append((plain_batch_norm(pool.norm, joined) + h[:, t]).relu())
    return torch.stack(frames, 1)

def plain_strl(layer, persons, previous, stride):
    """Paper Eq. 3, S Eq. 2 and paper Eq. 4 of one sequence.

    persons: person -> H (V, T, D); previous: person -> SM of the layer before, (V, T, H + D)."""
    own = {}
    for person, h in persons.items():
        g = h
        for graph_layer in layer.encoder.layers:
            g = plain_graph_layer(graph_layer, g, STAR["edges"])
        g = plain_layer_norm(layer.token_norm, g.sum(0))
        for block in layer.attention:
            g = plain_attention_block(block, g)
        own[person] = torch.cat([torch.stack([g] * len(h)), h], 2)  # Concat(Repeat(g; V), h)
    out = {}
    for person, h in persons.items():
        mixed = own[person] @ layer.own.weight.T
        if 1 - person in persons:  # W of the concatenation of both persons' SM
            both = torch.cat([own[person], (previous or own)[1 - person]], 2)
            mixed = both @ torch.cat([layer.own.weight, layer.other.weight], 1).T
        mixed = (plain_batch_norm(layer.norm, mixed) + layer.residual(h)).relu()
        out[person] = plain_pooling(layer.pool, mixed, stride)
    return out, {person: sm[:, ::stride] for person, sm in own.items()}

def plain_classifier(model, x, present, strides):
    """Logits of x (N, M, T, V, C), sequence by sequence."""
    logits = []
    for n in range(len(x)):
        persons = {}
        for m in range(x.shape[1]):
            if present[n, m]:
                h = model.embedding(x[n, m].transpose(0, 1)[:, None])[:, 0]
                persons[m] = h + model.strl.position
        previous = None
        for layer, stride in zip(model.strl.layers, strides):
            persons, previous = plain_strl(layer, persons, previous, stride)
        pooled = [torch.cat([h.mean((0, 1)), h.mean(0).amax(0)]) for h in persons.values()]
        logits.append(model.head(model.hidden_layer(sum(pooled) / len(pooled))))
    return torch.stack(logits)

def plain_embedding(e, x, mask):
    """JointEmbedding of STAR in eval mode: x (V, P, T, C), mask (V, P)."""
    V, P, T, _ = x.shape
    out = torch.empty(V, P, T, 8)
    for v, p, t in grid(V, P, T):
        here = x[v, p, t, :2]
        after = x[v, p, t + 1, :2] if t + 1 < T else here
        parent = STAR_PARENTS[v]
        inputs = dict(position=here, motion=after - here, bone=here - x[parent, p, t, :2])
        hidden = dict(bone=mask[parent, p])
        streams = []
        for name, norm in e.norms.items():
            C = len(inputs[name])
            every = norm.running_mean, norm.running_var, norm.weight, norm.bias
            mean, variance, weight, bias = (values[v * C:(v + 1) * C] for values in every)
            stream = (inputs[name] - mean) / (variance + 1e-5).sqrt() * weight + bias
            streams.append(0 * stream if hidden.get(name) else stream)
        h = e.mask_token if mask[v, p] else e.linear(torch.cat(streams))
        out[v, p, t] = h + e.joint[v]
    return out

def shaken(module):
    """The module in eval mode without zeros and ones: a forgotten bias or statistic shows."""
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for value in statistics(module).values():
        value.copy_(torch.rand_like(value) + 0.5)
    return module.eval()

def whiten_at_random(model):
    """Gives a SkeletonMAE a mean and a spread for every joint, and returns them."""
    model.mean.copy_(torch.randn_like(model.mean))
    model.spread.copy_(torch.rand_like(model.spread) + 0.5)
    return model.mean, model.spread

def statistics(module):
    return {name: value for name, value in module.named_buffers() if "running" in name}

def people(N, M, T, V, C, absent=()):
    """Random skeletons (N, M, T, V, C); the (sequence, person) pairs of `absent` are all zero."""
    x = torch.randn(N, M, T, V, C)
    for n, m in absent:
        x[n, m] = 0
    return x

class SkeletonTest(Case):
    def test_layouts(self):
        """Six parts cover all joints (paper 3.1.2); left mirrors right."""
        def mirror(name):
            side, other = ("left", "right") if "left" in name else ("right", "left")
            return name.replace(side, other)

        for layout in SKELETONS.values():
            joints, parts = layout["joints"], layout["parts"]
            limbs = ["left_arm", "right_arm", "left_leg", "right_leg"]
            self.assertEqual(list(parts), ["head", "torso", *limbs])
            self.assertEqual(sorted(sum(parts.values(), [])), list(range(len(joints))))
            other = [joints.index(mirror(name)) for name in joints]
            self.assertCountEqual(layout["pairs"], [[j, other[j]] for j, name in enumerate(joints)
                                                    if name.startswith("left")])
            bones = {frozenset(edge) for edge in layout["edges"]}
            self.assertEqual({frozenset(other[j] for j in bone) for bone in bones}, bones)
            for part in parts:
                self.assertEqual({other[j] for j in parts[part]}, set(parts[mirror(part)]))
            for limb, j in ((limb, j) for limb in limbs for j in parts[limb]):
                self.assertEqual(joints[j].split("_")[0], limb.split("_")[0])

    def test_bone_parents(self):
        """Bones are the edges, a tree; joint after joint they lead to the first centre joint."""
        self.assertEqual(bone_parents(STAR), STAR_PARENTS)
        for layout in SKELETONS.values():
            parents = bone_parents(layout)
            bones = [frozenset((j, p)) for j, p in enumerate(parents) if j != p]
            self.assertCountEqual(bones, map(frozenset, layout["edges"]))
            roots = [j for j, p in enumerate(parents) if j == p]
            self.assertEqual(roots, layout["centre"][:1])

    def test_own_skeleton_is_checked(self):
        made = make_skeleton("a b c", zip([0, 1], [1, 2]), {"all": [0]}, 0, zip([1], [2]))
        self.assertEqual((made["edges"], made["pairs"]), ([[0, 1], [1, 2]], [[1, 2]]))
        good = dict(joints="a b c", edges=[(0, 1)], parts={"a": [0]}, centre=0)
        for bad in (dict(edges=[(0, 5)]), dict(edges=[(0, -1)]), dict(edges=[(0, 1, 2)]),
                    dict(parts={}), dict(parts={"a": []}), dict(parts={"a": [3]}),
                    dict(centre=[]), dict(centre=3), dict(pairs=[(0, 1), (1, 2)]),
                    dict(edges=[(0, 1.0)]), dict(parts={"a": [0.0]})):
            with self.subTest(bad), self.assertRaises(ValueError):
                make_skeleton(**{**good, **bad})

class MaskTest(Case):
    def masked(self, num=60, **how):
        """The set of masked joints (True, not False) of every sequence."""
        masks = draw_mask(num, COCO, **how)
        return [frozenset(row.nonzero().flatten().tolist()) for row in masks]

    def test_parts(self):
        """Default: right arm and leg (ours); named parts; or K parts, every union of K drawn."""
        self.assertEqual(set(self.masked()), {frozenset([8, 10, 14, 16])})
        self.assertEqual(set(self.masked(mask_parts=["head", "left_leg"])),
                         {frozenset([0, 1, 2, 3, 4, 13, 15])})
        for count in (1, 2, 5):
            chosen = combinations(COCO["parts"].values(), count)
            self.assertEqual(set(self.masked(300, mask_num_parts=count)),
                             {frozenset(sum(parts, [])) for parts in chosen})

    def test_ratio(self):
        """Exactly round(R V) joints (S Table 2), each joint as often as any other."""
        for ratio, count in ((0.3, 5), (0.5, 8), (0.7, 12), (0.9, 15)):
            masked = self.masked(600, mask_ratio=ratio)
            self.assertEqual({len(joints) for joints in masked}, {count})
            for joint in range(17):
                share = sum(joint in joints for joints in masked) / 600
                self.assertAlmostEqual(share, count / 17, delta=0.09)

    def test_refused(self):
        """Never all joints and never none; unknown names are answered with the known ones."""
        for how in (dict(mask_ratio=1.0), dict(mask_ratio=0.01), dict(mask_num_parts=6),
                    dict(mask_num_parts=7), dict(mask_parts=list(COCO["parts"])),
                    dict(mask_parts=())):
            with self.subTest(how), self.assertRaises(ValueError):
                draw_mask(2, COCO, **how)
        self.assertRaisesRegex(ValueError, "mask 7 of 6", draw_mask, 2, COCO, mask_num_parts=7)
        with self.assertRaisesRegex(ValueError, "right_arm, right_leg.*trunk, head, left, right"):
            draw_mask(2, STAR)

class LayerTest(Case):
    adjacency = normalized_adjacency(STAR)

    def test_adjacency(self):
        """D^-1/2 (A + I) D^-1/2 of S Eq. 1, entry by entry; it moves with .to(), unstored."""
        degree = [2, 5, 2, 2, 2]
        expected = torch.diag(torch.tensor([1 / d for d in degree]))
        for i, j in STAR["edges"]:
            expected[i, j] = 1 / math.sqrt(degree[i] * degree[j])
            expected[j, i] = expected[i, j]
        close(self.adjacency, expected)
        model = SkeletonMAE(COCO, 2).double()  # 3 encoder layers and 1 decoder layer (paper 3.1.1)
        buffers = {name: b.dtype for name, b in model.named_buffers() if "adjacency" in name}
        self.assertEqual(list(buffers.values()), [torch.float64] * 4)
        self.assertFalse(buffers.keys() & model.state_dict().keys())

    def test_graph_convolution(self):
        """S Eq. 1 by loops over edges: output, gradients, statistics; finite differences."""
        for (width_in, width_out), training in product([(3, 6), (6, 3), (4, 4)], (True, False)):
            layer = shaken(GraphConvolution(self.adjacency, width_in, width_out)).train(training)
            plain = copy.deepcopy(layer)
            x = torch.randn(5, 2, 3, width_in, requires_grad=True)
            ours = layer(x)
            expected = plain_graph_layer(plain, x, STAR["edges"], training)
            direction = torch.randn_like(ours)
            close(ours, expected)
            close(torch.autograd.grad(ours, [x, *layer.parameters()], direction),
                  torch.autograd.grad(expected, [x, *plain.parameters()], direction))
            close(statistics(layer), statistics(plain))
            inputs = (x.detach().double().requires_grad_(), *layer.double().parameters())
            torch.autograd.gradcheck(lambda x, *_: layer(x), inputs, fast_mode=True)

    def test_size_and_dropout(self):
        """S A: 1.5 M parameters; 0.2 of the features, one draw for all frames; 0.1 in attention."""
        model = SkeletonClassifier(COCO, 2, classes=60, persons=2, frames=64)
        size = sum(parameter.numel() for parameter in model.parameters())
        self.assertAlmostEqual(size, 1.5e6, delta=0.1e6)
        self.assertEqual([layer.encoder.dropout for layer in model.strl.layers], [0.2] * 3)
        self.assertEqual(AttentionBlock(8).dropout, 0.1)
        encoder = GraphEncoder(self.adjacency, 8, 8, layers=0)
        ones = torch.ones(5, 500, 3, 8)
        h = encoder(ones)
        equal(h, h[:, :, :1].expand_as(h))
        self.assertEqual(h.unique().tolist(), [0, 1.25])
        self.assertAlmostEqual(float(h.mean()), 1, delta=0.02)
        self.assertGreater(min(h.std(axis).max() for axis in (0, 1, 3)), 0)  # drawn for each
        equal(encoder.eval()(ones), ones)
        block = shaken(AttentionBlock(8, heads=2, dropout=1.0))
        g = torch.randn(3, 5, 8)
        equal(block.train()(g), g + block.project.bias)  # no frame and no feed-forward

    def test_attention_and_pooling(self):
        """Pre-norm attention person by person and head by head; pooling frame by frame (ours)."""
        block = shaken(AttentionBlock(8, heads=2))
        g = torch.randn(3, 5, 8)
        close(block(g), torch.stack([plain_attention_block(block, person) for person in g]))
        for stride, T in product((1, 2), (1, 6, 7)):
            pool = shaken(TemporalPooling(8, stride))
            h = torch.randn(3, 2, T, 8)
            close(pool(h), torch.stack([plain_pooling(pool, h[:, p], stride) for p in (0, 1)], 1))

    def test_joint_embedding(self):
        """Joints, motion and bones, mask token and joint embedding, by loops."""
        for motion, bone in grid(2, 2):
            embedding = shaken(JointEmbedding(STAR, 2, 8, motion, bone))
            asked = dict(position=True, motion=motion, bone=bone)
            self.assertEqual(list(embedding.norms), [name for name in asked if asked[name]])
            x = torch.randn(5, 3, 4, 2)
            close(embedding(x), plain_embedding(embedding, x, torch.zeros(5, 3).bool()))
            mask = torch.rand(5, 3) < 0.4
            close(embedding(x, mask), plain_embedding(embedding, x, mask))

    def test_masked_joints_have_no_influence(self):
        """Not through motion, nor through a visible child's bone."""
        embedding = shaken(JointEmbedding(STAR, 2, 8, motion=True, bone=True))
        x = torch.randn(5, 3, 4, 2)
        mask = torch.rand(5, 3) < 0.4
        other = torch.where(mask[..., None, None], torch.randn_like(x), x)
        equal(embedding(x, mask), embedding(other, mask))
        self.assertFalse(torch.equal(embedding(x), embedding(other)))
        trained = []
        for how in (None, mask):  # the zeros that hide a bone are no data to the norm
            trained.append(copy.deepcopy(embedding).train())
            trained[-1](x, how)
        equal(*map(statistics, trained))

class PretrainingTest(Case):
    def test_reweighted_cosine_error(self):
        """Paper Eq. 2, (1 - cos)^beta, by a loop over the masked joints; beta is 2 by default."""
        prediction, target = torch.randn(2, 4, 5, 3)
        selected = torch.rand(4, 5) < 0.5
        for how, beta in ((dict(), 2), (dict(beta=1), 1), (dict(beta=3), 3)):
            errors = []
            for y, x in zip(prediction[selected].tolist(), target[selected].tolist()):
                cosine = sum(a * b for a, b in zip(x, y)) / math.hypot(*x) / math.hypot(*y)
                errors.append((1 - cosine) ** beta)
            loss = reweighted_cosine_error(prediction, target, selected, **how)
            self.assertAlmostEqual(loss.item(), sum(errors) / len(errors), places=5)

    def test_degenerate_vectors(self):
        """An all-zero vector has cosine 0 and a finite gradient; an empty selection costs 0."""
        target = torch.randn(6, 3)
        selected = torch.ones(6, dtype=torch.bool)
        starts = ((torch.zeros(6, 3), 1), (target, 0), (5 * target, 0), (-target, 2))
        for beta, (start, expected) in product((1, 2, 3), starts):
            prediction = start.clone().requires_grad_()
            loss = reweighted_cosine_error(prediction, target, selected, beta)
            self.assertAlmostEqual(loss.item(), expected ** beta, places=5)
            self.assertTrue(torch.autograd.grad(loss, prediction)[0].isfinite().all())
        self.assertEqual(reweighted_cosine_error(target, -target, ~selected), 0)

    def test_loss(self):
        """Paper Eq. 2 over masked joints that were seen; the target is whitened (ours)."""
        absent = [(1, 1), (2, 0)]
        x = people(4, 2, 3, 5, 2, absent)
        x[3, 1, 2] = 0
        model = shaken(tiny_mae(mask_num_parts=2, beta=3))
        mean, spread = whiten_at_random(model)
        for seen in (None, torch.rand(4, 2, 3, 5) < 0.5):
            loss, prediction, mask = model(x, seen=seen)
            self.assertEqual((prediction.shape, mask.shape), ((4, 2, 3, 5, 3), (4, 5)))
            errors = []
            for n, m, t, v in grid(4, 2, 3, 5):
                counts = x[n, m, t, v].any() if seen is None else seen[n, m, t, v]
                if mask[n, v] and counts and (n, m) not in absent:
                    target = F.pad((x[n, m, t, v] - mean[v]) / spread[v], (0, 1), value=1.0)
                    y = prediction[n, m, t, v]
                    errors.append((1 - target @ y / target.norm() / y.norm()) ** 3)
            close(loss, sum(errors) / len(errors))

    def test_stack(self):
        """Ours: the squared error of each path about its mean and a tenth of that of the mean; each
        joint is decoded from the pooled features of its person, an output frame for as many as the
        strides skip."""
        strl = dict(persons=2, frames=6, strl_layers=3, blocks=1, heads=2)
        model = shaken(tiny_mae(mask_ratio=0.4, strl=strl))
        mean, spread = whiten_at_random(model)
        x, target = people(3, 2, 6, 5, 2, [(1, 1)]), people(3, 2, 6, 5, 2, [(1, 1)])
        seen = torch.rand(3, 2, 6, 5) < 0.7
        seen[1, 1] = False
        loss, prediction, mask = model(x, target=target, seen=seen)
        errors = []
        for n, m, v in grid(3, 2, 5):
            frames = seen[n, m, :, v].nonzero()[:, 0]
            position = mean[v] + spread[v] * prediction[n, m, frames, v, :2]
            error = position - target[n, m, frames, v]
            still = 0.1 * error.mean(0).square().sum()
            errors += [(e - error.mean(0)).square().sum() + still for e in error]
        packing = Packing(x.flatten(2).any(2), "cpu")
        packed_mask = mask[packing.sequence].T
        encoded = model.encode(packing.pack(x), packing, packed_mask)  # (V, P, 2, D)
        moves = []
        for p, (n, m) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]):
            of_frames = encoded[:, p].mean(0)
            guesses = model.displacement(torch.cat([of_frames.mean(0), of_frames.amax(0)]))
            for v, (i, lag), c in product(range(5), enumerate((1, 2, 4, 5)), range(2)):
                changes = [target[n, m, t + lag, v, c] - target[n, m, t, v, c]
                           for t in range(6 - lag) if seen[n, m, t, v] and seen[n, m, t + lag, v]]
                if changes:
                    size = (torch.stack(changes).square().mean() + 1e-4).sqrt().log()
                    moves.append((guesses[8 * v + 2 * i + c] - size).square())
        close(loss, sum(errors) / len(errors) + 0.1 * sum(moves) / len(moves))
        decoder, inner = model.decoder, encoded.new_empty(*encoded.shape)
        for v, p, t in grid(*encoded.shape[:3]):
            of_frames = encoded[:, p].mean(0)
            pooled = torch.cat([of_frames.mean(0), of_frames.amax(0)])
            query = decoder.joint[v, 0, 0] + decoder.frame[t]
            inner[v, p, t] = decoder.mlp(decoder.pooled(pooled) + query)
        out = model.head(decoder.graph(inner))
        for t in range(6):
            of_frame = out[:, :, t // 4, 2 * (t % 4):][..., :2]
            close(packing.pack(prediction)[:, :, t, :2], of_frame)
        coordinates, _ = model.reconstruct(x, mask=mask)
        position = torch.stack([mean[v] + spread[v] * prediction[..., v, :2] for v in range(5)], 3)
        position[1, 1] = 0  # absent
        masked = mask[:, None, None, :, None]
        close(coordinates, torch.where(masked, position, x))
        close(model.reconstruct(x, mask=mask, target=target)[0],
              torch.where(masked, position, target))

    def test_reconstruct(self):
        """A masked joint is mean + spread y / max(w, 0.01) (ours), others stay, absent ones 0."""
        model = shaken(tiny_mae())
        mean, spread = whiten_at_random(model)
        x = people(3, 2, 4, 5, 2, absent=[(1, 1)])
        mask = torch.tensor([[False, False, True, True, False]] * 3)
        weights = model(x, mask=mask)[1][0, ..., [2, 3], 2]
        model.head.bias.data[2] -= weights.mean()  # now w has either sign
        prediction = model(x, mask=mask)[1]
        weights = prediction[..., [2, 3], 2:]
        self.assertTrue((weights < 0).any() and (weights > 0).any())
        expected = x.clone()
        for v in (2, 3):
            weight = prediction[..., v, 2:].clamp(min=0.01)
            expected[..., v, :] = mean[v] + spread[v] * prediction[..., v, :2] / weight
        expected[1, 1] = 0
        x[1, 1] = float("nan")  # what an absent person's coordinates hold does not matter
        present = torch.tensor([[True, True], [True, False], [True, True]])
        for who in (present, Packing(present, "cpu")):
            coordinates, drawn = model.reconstruct(x, who, mask)
            close(coordinates, expected)
            equal(drawn, mask)

class FinetuningTest(Case):
    def test_packing(self):
        """Unpacking undoes it; the other person, or 0; pooled over joints, frames and persons."""
        x = people(4, 2, 3, 5, 2, absent=[(0, 1), (2, 0)])
        present = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]]).bool()
        packing = Packing(present, "cpu")
        packed = packing.pack(x)  # (V, P, T, C)
        equal(packing.unpack(packed), x)
        other = packing.unpack(packing.other(packed))
        for n, m in grid(4, 2):
            equal(other[n, m], present[n].all() * x[n, 1 - m])
        pooled = []
        for n in range(4):
            of_frames = [x[n, m].mean(1) for m in (0, 1) if present[n, m]]  # each (T, C)
            persons = [torch.cat([h.sum(0) / 3, h.amax(0)]) for h in of_frames]
            pooled.append(sum(persons) / len(persons))
        close(packing.pool(packed), torch.stack(pooled))
        self.assertRaisesRegex(ValueError, "no person", Packing, torch.zeros(2, 2).bool(), "cpu")

    def test_shapes_are_checked(self):
        classifier = tiny_classifier(STAR, 2, 3)
        x = torch.randn(2, 1, 6, 5, 2)
        for wrong, words in ((x[:, 0], r"Tensor \(2, 6, 5, 2"), (x.tolist(), "list"),
                             (x / 0, "finite"), (torch.randn(2, 2, 4, 5, 2), r"\(2, 2"),
                             (torch.randn(2, 1, 4, 5, 3), "5, 3")):
            message = r"expected.*\(N, 1, T, 5, 2\).*" + words
            self.assertRaisesRegex(ValueError, message, classifier, wrong)
        self.assertRaisesRegex(ValueError, "no person present", classifier, 0 * x)
        for T in (1, 7):
            with self.assertRaisesRegex(ValueError, f"{T} frames; expected 6"):
                classifier(x[:, :, [0] * T])
        close(shaken(classifier)(x.double()), classifier(x))
        x = torch.randn(3, 2, 4, 5, 2)
        self.assertRaisesRegex(ValueError, r"present as bool \(N, M\), got", tiny_mae(), x,
                               torch.ones(2, 2) > 0)

    def test_equations(self):
        """Paper Eq. 3 and 4 and S Eq. 2 in the whole classifier, concatenations written out."""
        x = people(4, 2, 6, 5, 2, absent=[(1, 1), (2, 0)])
        present = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]])
        how = dict(persons=2, strl_layers=3)
        for stride in (1, 2):
            model = shaken(tiny_classifier(STAR, 2, 3, stride=stride, **how))
            close(model(x), plain_classifier(model, x, present, strides=(stride, stride, 1)))
        model = shaken(tiny_classifier(STAR, 2, 3, persons=1))
        one = x[:, :1]
        there = torch.ones(4, 1).bool()
        close(model(one, there), plain_classifier(model, one, there, strides=(2, 1)))
        self.assertFalse([name for name, _ in model.named_parameters() if ".other" in name])

    def test_persons_swapped(self):
        """S Eq. 2 treats both persons alike: their order does not matter, another partner does."""
        model = shaken(tiny_classifier(STAR, 2, 3, persons=2))
        x = people(3, 2, 6, 5, 2)
        close(model(x), model(x.flip(1)))
        other_partners = torch.stack([x[:, 0], x[:, 1].flip(0)], 1)
        self.assertGreater((model(x) - model(other_partners))[[0, 2]].abs().max(), 1e-2)

    def test_person_absent(self):
        """The W_other term is exactly 0; neither its values nor the rest of the batch matter."""
        model = shaken(tiny_classifier(STAR, 2, 3, persons=2))
        x = people(2, 2, 6, 5, 2, absent=[(1, 1)])
        logits = model(x)
        garbage = x.clone()
        garbage[1, 1] = float("nan")
        equal(model(garbage, torch.tensor([[True, True], [True, False]])), logits)
        model(x[1:]).sum().backward()
        for name, p in model.named_parameters():  # several processes wait for all gradients
            self.assertEqual(p.requires_grad, p.grad is not None, name)
        close(model(x[1:]), logits[1:])
        for layer in model.strl.layers:
            layer.other.weight.data.mul_(-3)
        equal(model(x)[1], logits[1])
        self.assertGreater((model(x)[0] - logits[0]).abs().max(), 1e-3)

    def test_drop_path(self):
        """In training a person passes by the residual alone, or with the branch scaled up."""
        how = dict(dropout=0, attention_dropout=0, drop_path=0.5)
        layer = tiny_classifier(STAR, 2, 3, **how).strl.layers[0]
        layer.pool = torch.nn.Identity()
        layer.pool.stride = 1
        branch = []
        layer.norm.register_forward_hook(lambda norm, inputs, output: branch.append(output))
        h, packing = torch.randn(5, 40, 4, SMALL["width"]), Packing(torch.ones(40, 1).bool(), "cpu")
        found = layer(h, None, packing)[0]
        alone, scaled = (F.relu(scale * branch[0] + layer.residual(h)) for scale in (0, 2))
        dropped = (found == alone).transpose(0, 1).flatten(1).all(1)
        close(found, torch.where(dropped[:, None, None], alone, scaled))
        self.assertTrue(8 < dropped.sum() < 32)
        tested = layer.eval()(h, None, packing)[0]
        close(tested, F.relu(branch[1] + layer.residual(h)))

    def test_absent_persons_leave_no_trace(self):
        """Three persons in two sequences equal three sequences of one, loss and statistics."""
        mae = tiny_mae(dropout=0, motion=True)
        classifier = tiny_classifier(STAR, 2, 3, persons=2, dropout=0, attention_dropout=0)
        for layer in classifier.strl.layers:
            layer.other.weight.data.zero_()  # it would tell the two batches apart
        x = people(2, 2, 6, 5, 2)
        alone = torch.zeros(3, 2, 6, 5, 2)
        alone[:, 0] = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
        x[1, 1] = float("nan")  # what an absent person's coordinates hold does not matter
        present = torch.tensor([[True, True], [True, False]])
        close(copy.deepcopy(mae)(x, present)[0], copy.deepcopy(mae)(alone)[0])
        features = copy.deepcopy(mae).eval().features(x, present)
        close(features[present], copy.deepcopy(mae).eval().features(alone)[:, 0])
        self.assertFalse(features[~present].any())
        for together in (mae, classifier):
            apart = copy.deepcopy(together)
            together(x, present)
            apart(alone)
            close(statistics(together), statistics(apart))

    def test_any_input(self):
        """Any layout, T, M, C and streams, also under autocast; all parameters are trained."""
        for i, layout in enumerate([*SKELETONS.values(), STAR]):
            C = 2 + i // 2 % 2
            M = 1 + i % 2
            streams = dict(motion=i % 3 == 1, bone=i % 4 == 1)
            mae = SkeletonMAE(layout, C, **SMALL, mask_num_parts=2, **streams)
            T = (2, 4, 9)[i % 3]
            model = tiny_classifier(layout, C, 4, M, frames=T, **streams)
            x = people(3, M, T, len(layout["joints"]), C).abs()
            F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
            mae(x)[0].backward()
            for name, p in [*mae.named_parameters(), *model.named_parameters()]:
                self.assertTrue(not p.requires_grad or p.grad.any(), name)
            logits = model.eval()(x)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            self.assertEqual((half.shape, half.dtype), ((3, 4), torch.float32))
            self.assertLess((half - logits).norm() / logits.norm(), 0.05)

    def test_load_pretrained(self):
        """Embedding and encoder, into every STRL layer, or all STRL layers; nothing else."""
        strl = dict(persons=1, frames=6, strl_layers=2, blocks=1, heads=2)
        for how, copied, prefix in (
                (dict(), r"embedding\.|.*\.encoder\.", r"strl\.layers\.\d\.encoder"),
                (dict(strl=strl), r"embedding\.|strl\.", "strl")):
            state = shaken(tiny_mae(**how)).state_dict()
            model = tiny_classifier(STAR, 2, 3)
            before = copy.deepcopy(model.state_dict())
            names = model.load_pretrained(state)
            self.assertCountEqual(names, [name for name in before if re.match(copied, name)])
            for name, value in model.state_dict().items():
                origin = re.sub(prefix, "encoder", name, count=1)
                equal(value, state[origin] if name in names else before[name])

    def test_load_pretrained_refuses(self):
        model = tiny_classifier(STAR, 2, 3)
        before = copy.deepcopy(model.state_dict())
        settings = dict(SMALL, skeleton=STAR, channels=2, mask_parts=["head"])
        for how in (dict(width=16), dict(hidden=16), dict(layers=3), dict(channels=3),
                    dict(skeleton=COCO), dict(motion=True),
                    dict(strl=dict(persons=1, frames=6, strl_layers=2, blocks=2))):
            mae = SkeletonMAE(**{**settings, **how})
            with self.assertRaisesRegex(ValueError, "do not fit: .* is .* here", msg=how):
                model.load_pretrained(mae.state_dict())
            equal(model.state_dict(), before)

    def test_linear_probe(self):
        """Pooled features, batch norm without weights, one linear layer; the rest is frozen, but
        for the statistics of batch norms, and has no dropout."""
        mae = tiny_mae(dropout=0.5)
        probe = shaken(LinearProbe(mae.train(), classes=3))
        before = {name: p.clone() for name, p in mae.named_parameters()}
        x = people(4, 2, 3, 5, 2, absent=[(1, 1)])
        pooled = []
        for n, persons in enumerate((2, 1, 2, 2)):
            features = []
            for m in range(persons):
                h = mae.embedding(x[n, m].transpose(0, 1)[:, None])[:, 0]  # (V, T, D)
                for layer in mae.encoder.layers:
                    h = plain_graph_layer(layer, h, STAR["edges"])
                features.append(torch.cat([h.sum((0, 1)) / 15, h.mean(0).amax(0)]))
            pooled.append(sum(features) / len(features))
        variance = probe.norm.running_var + 1e-5
        normed = (torch.stack(pooled) - probe.norm.running_mean) / variance.sqrt()
        close(probe.features(x), normed)
        close(probe(x), normed @ probe.head.weight.T + probe.head.bias)
        probe.train()(x).sum().backward()
        trained = [name for name, p in probe.named_parameters() if p.grad is not None]
        self.assertEqual(trained, ["head.weight", "head.bias"])
        equal(dict(mae.named_parameters()), before)
        packing = Packing(x.flatten(2).any(2), "cpu")
        h = expected = mae.embedding(packing.pack(x))
        for layer in mae.encoder.layers:
            expected = plain_graph_layer(layer, expected, STAR["edges"], training=True)
        close(mae.encoder(h), expected)
        probe.eval()
        self.assertFalse(any(module.training for module in probe.modules()))

    def test_copied_alone(self):
        program = """
from skeletonmae import *
classifier = SkeletonClassifier(SKELETONS["coco17"], channels=2, classes=5)
classifier.load_pretrained(SkeletonMAE(SKELETONS["coco17"], channels=2).state_dict())
print(tuple(classifier(torch.randn(2, 1, 64, 17, 2)).shape))
"""
        shutil.copy(skeletonmae.__file__, ".")
        done = python("-E", "-c", program)  # without PYTHONPATH
        self.assertEqual((done.stdout, done.stderr), ("(2, 5)\n", ""))

# ------------------------------------------------------------------------------ the data

FIVE = dict(joints=["root", "left_hand", "right_hand", "left_foot", "right_foot"],
            edges=[[0, 1], [0, 2], [0, 3], [0, 4]], centre=[0], pairs=[[1, 2], [3, 4]],
            parts=dict(torso=[0], left_arm=[1], right_arm=[2], left_leg=[3], right_leg=[4]))

def numbers(x: torch.Tensor, big=False) -> bytes:
    """The bytes of an array, as numpy has them in memory; big: most significant byte first."""
    octets = x.contiguous().flatten().view(torch.uint8).view(-1, x.itemsize)
    return bytes((octets.flip(1) if big else octets).flatten().tolist())

def npy(x: torch.Tensor, big=False, fortran=False, version=1, code="") -> bytes:
    """A .npy file, written byte by byte."""
    kind = "f" if x.is_floating_point() else "b" if x.dtype == torch.bool else "i"
    code = code or (">" if big else "<") + kind + str(x.itemsize)
    header = f"{{'descr': '{code}', 'fortran_order': {fortran}, 'shape': {tuple(x.shape)}, }}"
    header = header.encode().ljust(117) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    body = numbers(x.permute(*range(x.dim())[::-1]) if fortran else x, big)
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + body

def ctr_gcn(columns=60, compression=zipfile.ZIP_STORED, **other) -> bytes:
    """An npz of 2 + 1 numbered sequences of 3 frames; other: arrays, or .npy files as bytes."""
    x = 1 + torch.arange(6.0 * columns).view(2, 3, columns)
    entries = dict(x_train=x, y_train=torch.tensor([1, 0]), x_test=x[:1], y_test=torch.tensor([1]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {**entries, **other}.items():
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return file.getvalue()

class NumpyPickler(pickle._Pickler):
    """Writes tensors as numpy 1 writes arrays of float32 (NUMPY_PICKLES are the real ones)."""
    dispatch = dict(pickle._Pickler.dispatch)

    def save_tensor(self, x):
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR(K\1")
        self.save(tuple(x.shape))
        self.write(b"cnumpy\ndtype\n(X\2\0\0\0f4\x89\x88tR(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xff"
                   b"J\xff\xff\xff\xffK\0tb\x89")
        self.save(numbers(x.float()))
        self.write(b"tb")

    dispatch[torch.Tensor] = save_tensor

def pickled(annotations, classes=None, **split) -> bytes:
    """split: names of the training and of the test sequences; without it a bare list."""
    file = io.BytesIO()
    content = dict(annotations=annotations, classes=classes, split=split) if split else annotations
    NumpyPickler(file, 4).dump(content)
    return file.getvalue()

def pyskl(x=4, scores=None, classes=2) -> list:
    """Annotations a0, a1, ... of x (N, M, T, V, C), or so many of penn13; scores: (N, M, T, V)."""
    if isinstance(x, int):
        x = 2 + torch.arange(52.0 * x).view(x, 1, 2, 13, 2)
    annotations = [dict(frame_dir=f"a{n}", label=n % classes, keypoint=k) for n, k in enumerate(x)]
    for n in range(len(x)) if scores is not None else ():
        annotations[n]["keypoint_score"] = scores[n]
    return annotations

# Three pickles of numpy 2.4.6 (protocols 5 and 4) and 1.26.4 (2), joined by "|", zlib and base85:
# annotations a0 to a2, keypoint arange(52 (n + 1)) % 5 + n + 1 of shape (2, n + 1, 13, 2) as "<f2",
# "<f4" in Fortran order and ">f8", keypoint_score 0.5 of the same dtype, labels int64(1), 0 and
# int64(2), one tuple as img_shape and original_shape.
NUMPY_PICKLES = """
c-rlmZBrXn6vsCSPzZ%$p)FM`_Q^(T5n|L>u|z_vHiCLpj1L%h!-l&y+2p_3IKzz0@J1jr`>wZr%_ni3_6zU{9KMO(yAOFFFx1Y7
!d#fmJ-d6d_nf=uoO^zg_3lSw1B&~%#$rx)wNf-}=8CqZ8YWxfVpyGI{9}sgPUIK0$glCUI8$p*ziOIgTeXd{Srw|{i+u%4E$O*s
!(!eyyNjx(7nyV3td%OO6S;iZ(kDu_qHU;_rLHokr<zxbs>L31T~~*X%l2wT7gxeYlGV318DX(Z#0gEag@uLtfAK%}Bcs?%OZSF6
7ZkR^^_)JVw34e*l|Nv9H#EN(*<j9K*)moPQ!V;8=(yASKwqtt4bx`MaI0xt)-5B?oc>(FDwnicp`Z)nVvngmjWVsIlv!m?x%=-*
jGlACg?Q6{da={{SSFkaWd<@~?nfxiY_S4^for*{aEZ}tvB!zP_~bwTXVjl%lhK=Eh8lm<bifS?dM2aLOLUyR!jH>hrtRQ$DBKxk
ogXQFZ2R&bzO49iDkb&)8$B<)5{HLZI0&zMZg|lN@s@WQFIky6Ne81z&*hF-kMmfkXX$9VH{4op+Jk?$%a8nCe;o415q})@$1$lV
^`xHEJDz&p=F!%h-C_H09}#c+@T#e|c~txgI<qTBIUe2E5w$ea8M9u<HnxAgHu39v*Q48#ljx9hI%ny5?uBjD@;0BB4m+pJWzWEe
ETjC!(jkp`W`tVM<XK3jo~B1eR(!fnO1es~3lHcG-~I;k+^VM&&&5rAnuAek?{qD#_Oo>6TeCiBN!a;6Ll%EibZWoQ@(?3cPw$*K
glY}@!>MV%JczX9!J$n?eO6GH?AWB9)RTHAmbebwNxW`#Z)dx>U!fG>C1F60M+#k{9dIcsyapwf?dI29fI?^uVej0fC`6Xf70Ze~
L7hamCrqJ7&qlb!kqW1l(Cb}}qff16`-RwKD@2#jA6vueShkPfX%H3$f`<;ev$>>&GkK4+_JCH@!>lNVy!%m?v7&gveTI?5S)OAU
CK%yamK81dG|uhKHJsP-oZy!Ad^M_@LWtr*R%CL(U>MEzxTe^KIfaWGc#+_x4U7@I>>A&IGhFiN4CC2Bexsexz<Vh7xdF`J@&RtO
l3Ns4eCK?4i{dJ;D!4{3xE^V^PPs|165QBCjNr94n#1eVTZ}>+H^pMSL2yfyoX%yK(CYk=^ay`6!<)kLNrEXGam`(^cFx0F^a^#o
P4FU$w+Y^9vL4>$u*WS<Jm)WENQ&9tBe-qjecl9Pns>oLAb+q20DUv=2s35~Qf&-~4}(QcU{)-0nqY4KMZT+Tag+aS(BP8*Kb~v{
XHVCIQzbYHSVd|d7j4`V!SxZr$2LCEXd{mAivY?HeA)y{%+om$$2%wR7dkA6W%!KXa~ofX93zb!i{nd9n?rPjdc`(CPJAW4@-@NY
2EHN4b|&GsVhz6|_`VH5@k5Y=Ni2yZ{E;9Rl>IySsUsCtx86w{m3mT7>YZdgXriR%36^c>Et^q66w(y}+GJB0%_{n{sG<)DilUY2
te+*fe*P{f_35_1cS%7C$4!7KvZG8;u>qHU{|11zhQ<"""

class ReaderTest(Case):
    def test_npz_encodings(self):
        x = 1 + torch.arange(360.0).view(2, 3, 60)
        for big, fortran, version, compression, dtype in product(
                (False, True), (False, True), (1, 2), (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
                (torch.float16, torch.float32, torch.float64)):
            array = npy(x.to(dtype), big, fortran, version)
            loaded = self.read("a.npz", ctr_gcn(60, compression, x_train=array))
            equal(loaded.train.frames.float(), x.view(6, 1, 20, 3))

    def test_npz_labels(self):
        """One-hot or integers, from 0 or 1 on, a column too; other arrays are not read."""
        hot = torch.eye(2)[[1, 0]]
        for y in (hot.double(), hot.bool(), hot.long(), torch.tensor([1, 0]),
                  torch.tensor([[2], [1]]), torch.tensor([2, 1], dtype=torch.int16)):
            loaded = self.read("a.npz", ctr_gcn(y_train=y, y_test=y[:1], junk=npy(y, code="|O")))
            labels = [loaded.train.label.tolist(), loaded.test.label.tolist()]
            self.assertEqual(labels, [[1, 0], [1]])

    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "needs Linux's list of memory maps")
    def test_npz_stays_in_the_file(self):
        """It is mapped, not read; writing never reaches the file."""
        frames = self.read("a.npz", ctr_gcn(150)).train.frames
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = [line.split()[0].split("-") for line in lines if line.endswith("a.npz")]
        here = frames.data_ptr()
        self.assertTrue(any(int(low, 16) <= here < int(high, 16) for low, high in mapped))
        frames.zero_()
        self.assertEqual(Path("a.npz").read_bytes(), ctr_gcn(150))

    def test_npz_columns(self):
        """Value m 75 + v 3 + c of NTU's 150 columns is at [m, v, c]; --layout decides."""
        for columns, wanted, layout, shape in (
                (150, None, "ntu25", (2, 25, 3)), (60, None, "kinect20", (1, 20, 3)),
                (34, None, "coco17", (1, 17, 2)), (90, None, "sbu15", (2, 15, 3)),
                (34, "h36m17", "h36m17", (1, 17, 2))):
            loaded = self.read("a.npz", ctr_gcn(columns), layout=wanted)
            self.assertEqual(loaded.layout, layout)
            equal(loaded.train.frames, 1 + torch.arange(6.0 * columns).view(6, *shape))

    def test_bad_npz(self):
        x = torch.ones(2, 3, 60)
        for content, words in (
                (ctr_gcn()[:700], "a.npz is damaged or not CTR-GCN.*zip file"),
                (ctr_gcn(x_train=npy(x)[:-4]), "a.npz.*damaged.*buffer"),
                (ctr_gcn(x_train=npy(x, code="|O")), r"dtype '\|O'.*f2, f4"),
                (ctr_gcn(x_train=npy(x).replace(b"{'", b"{ ")), "a.npz.*damaged.*SyntaxError"),
                (ctr_gcn(x_train=x.long()), "x_train.*int64.*floats"),
                (ctr_gcn(x_train=1e10 * x), r"train\[0\].*absurd"),
                (ctr_gcn(x_train=math.nan * x), r"train\[0\].*NaN"),
                (ctr_gcn(61), "61 columns.*--layout"),
                (ctr_gcn(y_train=torch.zeros(3)), r"labels \(3,\).*for 2 sequences"),
                (ctr_gcn(y_train=torch.ones(2, 2)), r"labels \(2, 2\).*one-hot"),
                (ctr_gcn(x_train=torch.ones(4, 3, 60), y_train=torch.ones(2, 2)), "for 4 sequ"),
                (ctr_gcn(x_test=torch.ones(1, 3, 150)), "same persons.*in the test")):
            self.refused("a.npz", content, words)

    def test_pickles_of_numpy(self):
        joined = zlib.decompress(base64.b85decode(NUMPY_PICKLES.replace("\n", "")))
        for content in joined.split(b"|"):
            loaded = self.read("a.pkl", content)
            self.assertEqual((loaded.layout, loaded.split), ("penn13", "train / val"))
            self.assertTrue(loaded.scored)
            self.assertTrue(loaded.train.seen.all())  # by scores of 0.5
            labels = [loaded.train.label.tolist(), loaded.test.label.tolist()]
            self.assertEqual(labels, [[1, 0], [2]])
            train = loaded.train.frames
            for n, x in enumerate((train[:1], train[1:3], loaded.test.frames[-3:])):
                numbered = torch.arange(52 * (n + 1)).view(2, n + 1, 13, 2) % 5 + n + 1
                equal(x.transpose(0, 1), numbered.double())

    def test_random_split(self):
        """The same share of each class, whatever the order and the other classes; never all. What
        has no label trains, beside others that have one."""
        def test_names(*sizes, step=1):
            annotations = [dict(pyskl(1)[0], frame_dir=f"{label}_{i:02}", label=label)
                           for label, size in enumerate(sizes) for i in range(size)]
            loaded = self.read("a.pkl", pickled(annotations[::step]), test_fraction=0.3)
            self.assertEqual(len({*loaded.train.names, *loaded.test.names}), len(annotations))
            return set(loaded.test.names)

        drawn = test_names(20, 10, 2, 1)
        self.assertEqual([sum(n[0] == label for n in drawn) for label in "0123"], [6, 3, 1, 0])
        self.assertEqual(test_names(20, 10, 2, 1, step=-1), drawn)
        self.assertEqual(test_names(20, 10), {n for n in drawn if n < "2"})
        self.assertNotEqual(test_names(20), {f"0_{i:02}" for i in range(6)})  # not the first ones
        bare = [dict(a, label=a["label"] if n < 10 else None) for n, a in enumerate(pyskl(30))]
        loaded = self.read("a.pkl", pickled(bare), test_fraction=0.3)
        self.assertEqual((len(loaded.test), loaded.test.label.min()), (4, 0))
        loaded = self.read("a.pkl", pickled(bare[10:]), test_fraction=0.3)
        self.assertEqual(len(loaded.test), 6)

    def test_pickle_of_many_persons(self):
        """Those of the highest score, in their order, else those that move most: not by coming."""
        scores = torch.tensor([0.2, 0.6, 0.1, 0.9]).view(4, 1, 1).expand(2, 4, 2, 13)
        numbered = torch.arange(1.0, 5)[:, None, None, None].expand(2, 4, 2, 13, 2)
        content = pickled(pyskl(numbered, scores), train=["a0"], test=["a1"])
        loaded = self.read("a.pkl", content)
        equal(loaded.train.frames[0, :, 0, 0], torch.tensor([2.0, 4.0]))
        self.assertIn("4 persons beyond 2 a sequence left out", str(loaded))
        moves = 2.0 + torch.arange(6)
        more, nobody, still = 3 * moves, 0 * moves, 0 * moves + 2
        flickers = torch.tensor([0.0, 0, 0, 99, 0, 0])
        for persons, kept in (
                ([still, moves, more], [1, 2]), ([moves, flickers, more], [0, 2]),
                ([nobody, still, more], [1, 2]), ([still, nobody, more], [0, 2])):
            x = torch.stack(persons)[:, :, None, None].expand(2, 3, 6, 13, 2)
            loaded = self.read("a.pkl", pickled(pyskl(x), train=["a0"], test=["a1"]))
            equal(loaded.train.frames[:6, :, 0, 0].T, torch.stack([persons[k] for k in kept]))
        x = torch.stack([nobody, nobody, more])[:, :, None, None].expand(1, 3, 6, 13, 2)
        scored = dict(pyskl(2)[1], keypoint_score=torch.full((1, 2, 13), 0.5))  # beside them
        loaded = self.read("a.pkl", pickled([*pyskl(x), scored], train=["a0"], test=["a1"]))
        equal(loaded.train.frames[:6, :, 0, 0].amax(1), more)

    def test_splits(self):
        """Test before val, which is named; twice counts twice; the checkpoint's pair holds."""
        def split(asked=None, pair=(), **splits):
            return self.read("a.pkl", pickled(pyskl(6), **splits), split=asked, pair=pair)

        three = dict(train=["a0", "a1", "a1"], val=["a2"], test=["a3", "a4"])
        found = split(**three)
        self.assertEqual((found.split, found.pair), ("train / test, val unused", ("train", "test")))
        self.assertIn(", 1 names twice", str(found))
        self.assertEqual(found.train.names, ["a0", "a1", "a1"])
        self.assertEqual(split("train,val", **three).test.names, ["a2"])
        self.assertEqual(split(pair=("train", "val"), **three).test.names, ["a2"])
        self.assertEqual(split(pair=("xsub_train", "xsub_val"), **three).test.names, ["a3", "a4"])
        alone = split(train=["a0", "a5"])
        self.assertEqual((len(alone.train), len(alone.test)), (2, 0))
        numbered = [dict(a, frame_dir=float(n)) for n, a in enumerate(pyskl(6))]
        arrays = pickled(numbered, train=torch.arange(4), test=torch.arange(4, 6))
        self.assertEqual(self.read("a.pkl", arrays).test.names, ["4.0", "5.0"])

    def test_shapes_and_labels(self):
        """(T, V, C) and bare arrays are read; labels with gaps are numbered, unless named."""
        x = torch.rand(7, 13, 2)
        scored = dict(keypoint=x[None], keypoint_score=1 + x[..., 0])
        for content in ([x, x], [dict(keypoint=x), scored]):
            found = self.read("a.pkl", pickled(content), test_fraction=0.5)
            self.assertEqual((len(found.train), found.classes), (1, []))
            equal(found.train.frames[:7, 0], x)
        gaps = [dict(a, label=7000 * n) for n, a in enumerate(pyskl())]
        every = dict(train=["a0", "a1", "a2", "a3"], test=["a3"])
        for annotations, named, classes, labels in (
                (gaps, None, ["0", "7000", "14000", "21000"], [0, 1, 2, 3]),
                (pyskl(), ["sit", "run", "eat"], ["sit", "run", "eat"], [0, 1, 0, 1])):
            found = self.read("a.pkl", pickled(annotations, named, **every))
            self.assertEqual((found.classes, found.train.label.tolist()), (classes, labels))

    def test_bad_pickle(self):
        x = torch.ones(1, 2, 13, 2)
        for change, words in ((dict(keypoint=[1.0]), "keypoint is list"),
                              (dict(keypoint=torch.ones(31, 1, 13, 2)), "persons before frames"),
                              (dict(keypoint=torch.ones(1, 2, 14, 2)), "14"),
                              (dict(keypoint=torch.ones(1, 2, 13, 4)), "2 or 3.*a score belongs"),
                              (dict(keypoint=x[:, :0]), r"\(1, 0, 13, 2\).*none of them 0"),
                              (dict(keypoint_score=x[:, :1, :, 0]), "keypoint_score"),
                              (dict(keypoint_score=x[..., 0] / 0), "finite"),
                              (dict(label="run"), "label 'run'.*integer"),
                              (dict(label=-1), "label -1; expected an integer from 0, or none")):
            annotations = [*pyskl(2), {**pyskl(1)[0], "frame_dir": "bad", **change}]
            self.refused("a.pkl", pickled(annotations), f"bad.*{words}")
        named = pickled([dict(filename="a", keypoint=x)], train=["a"], test=["a"])
        for content, words in ((named, "names no annotation.*frame_dir"),
                               (pickled([dict(keypoints=x)]), "no keypoint; got keypoints"),
                               (pickled([torch.rand(1, 5, 20, 2)]), "20 joints in 2D")):
            self.refused("a.pkl", content, words)
        for classes, words in (({"run": 1, "sit": 0}, "classes is dict.*expected a list"),
                               (["sit"], "label 1; expected 0 to 0")):
            self.refused("a.pkl", pickled(pyskl(), classes, train=["a0"], test=["a1"]), words)

    @unittest.skipUnless(sys.platform == "linux", "getrusage counts in kilobytes there")
    def test_memory(self):
        """Reading a pickle takes at most four times its size."""
        program = """
import resource, data
def peak(path):
    data.load(path)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-peak("small.pkl") + peak("large.pkl"))
"""
        x = torch.arange(4000.0).view(4000, 1, 1, 1, 1) + torch.rand(40, 17, 2)
        self.write("small.pkl", pickled(pyskl(x[:4])))
        self.write("large.pkl", pickled(pyskl(x)))
        done = python("-c", program)
        self.assertLess(1024 * int(done.stdout), 4 * os.path.getsize("large.pkl"), done.stderr)

    def test_hostile_files_run_nothing(self):
        """Files that would leave a marker are refused by the name of what they ask for."""
        run = b"cos\nsystem\n(S'touch ran'\ntR."
        call_eval = b"\x80\4\x8c\x08builtins\x8c\4eval\x93\x8c\x10open('ran', 'w')\x85R."
        build = b"cnumpy\nndarray\n}S'__setstate__'\ncposix\nsystem\nsb."
        build_class = b"\x80\2cnumpy\nndarray\nN}S'__setstate__'\nNs\x86b."
        for content, name in ((run, "os.system"), (call_eval, "builtins.eval"), (build_class, ""),
                              (build, "posix.system")):
            self.refused("a.pkl", content, name)
        self.refused("a.pt", run, "os.system")
        with self.assertRaisesRegex(DataError, r"\A.*os.system.*\Z"):
            train_pretrain.read_checkpoint("a.pt", ("pretrain",))
        self.refused("a.pt", pickled(pyskl()), "UnpicklingError: Unsupported")  # no unsafe advice
        self.assertFalse(os.path.exists("ran"))
        self.assertEqual(len(self.read("a.pkl", pickled(pyskl())).train), 2)  # it is unharmed
        pickle.loads(run)
        self.assertTrue(os.path.exists("ran"))

    def test_pt(self):
        """The same dict, of tensors in their precision; padding cut; T and M may differ."""
        shapes = [(1, 4, 17, 2), (2, 6, 17, 2), (1, 2, 17, 2)]
        x = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        x[1].data[:, 4:] = 0
        annotations = [dict(keypoint=k, label=3 + n) for n, k in enumerate(x)]
        split = dict(train=[0, 1, 2], test=[0])
        torch.save(dict(annotations=annotations, split=split), "a.pt")
        loaded = data.load("a.pt")
        train = loaded.train
        self.assertEqual((loaded.layout, loaded.classes), ("coco17", ["3", "4", "5"]))
        self.assertEqual((train.label.tolist(), train.length.tolist()), ([0, 1, 2], [4, 4, 2]))
        self.assertEqual(train.present.tolist(), [[True, False], [True, True], [True, False]])
        frames = [F.pad(s[:, :4], (0, 0, 0, 0, 0, 0, 0, 2 - len(s))) for s in x]
        equal(torch.cat([train.frames[i:i + n] for i, n in zip(train.start, train.length)]),
              torch.cat(frames, 1).transpose(0, 1).detach())
        self.assertEqual(train.subset([2, 0]).names, ["2", "0"])

def sequences(lengths=(5, 9, 3, 12)):
    """Random sequences of FIVE in 3D, labelled 0, 1, ...; the second person of every other one is
    absent."""
    draw = torch.Generator().manual_seed(0)
    parts = [3 * torch.randn(T, 2, 5, 3, generator=draw) + 20 for T in lengths]
    for part in parts[1::2]:
        part[:, 1] = 0
    names = [f"s{n}" for n in range(len(parts))]
    pairs = [(part, part.any(-1)) for part in parts]
    made = data.flatten(pairs, torch.arange(len(parts)), names, 2)
    return data.complete(data.Dataset(made, None)).train

def plain_normalise(x, centre: list, seen=None):
    """One sequence (M, T, V, C) centred and scaled with loops: (x, unit). seen: bool (M, T, V)."""
    seen = (x != 0).any(-1) if seen is None else seen
    there = [(m, t) for m, t in grid(*x.shape[:2]) if seen[m, t].any()]
    origin = torch.stack([x[m, t, j] for m, t in there for j in centre]).mean(0)
    squares = [(x[m, t, v] - origin).square().sum() for m, t, v in grid(*seen.shape)
               if seen[m, t, v]]
    unit = torch.stack(squares).mean().sqrt()
    present = x.flatten(1).any(1)[:, None, None, None]
    return present * (x - origin) / unit, unit

def plain_boxed(x):
    """Each axis of one sequence (M, T, V, C) from -1 to 1 over those who are there."""
    there = x.flatten(2).any(2)
    low = x[there].amin((0, 1))
    high = x[there].amax((0, 1))
    return ((x - low) / (high - low) * 2 - 1) * there[..., None, None]

def about(axis, angle):
    """The matrix (3, 3) of a turn: exponential of the cross product with the axis."""
    cross = torch.linalg.cross(torch.eye(3)[axis].expand(3, 3), torch.eye(3)).T
    return torch.matrix_exp(angle * cross)

class BatchTest(Case):
    def test_sample_frames_against_segments(self):
        """Testing takes the middle of each of T segments, training any frame of it."""
        T = 8
        lengths = [1, 3, 8, 20, 77]
        middle = [[int((t + 0.5) / T * L) for t in range(T)] for L in lengths]
        tested = data.sample_frames(torch.tensor(lengths), T, False, crop=0.5)
        self.assertEqual(tested.tolist(), middle)
        drawn = data.sample_frames(torch.tensor(lengths * 400), T, True).view(400, -1, T)
        for (i, L), t in product(enumerate(lengths), range(T)):
            segment = range(math.floor(t * L / T), math.ceil((t + 1) * L / T))
            self.assertEqual(set(drawn[:, i, t].tolist()), set(segment))
        self.assertGreater(drawn[:, 4].diff(dim=1).float().std(), 2)  # each frame by itself

    def test_crop(self):
        """A window of at least that share that begins anywhere."""
        drawn = data.sample_frames(torch.full((2000,), 1000), 100, True, 0.5)
        span = (drawn[:, -1] - drawn[:, 0]) / 1000
        self.assertTrue((drawn.diff(dim=1) >= 0).all() and drawn[:, 0].max() > 400)
        self.assertTrue(0 <= drawn.min() < drawn.max() <= 999)
        self.assertTrue(0.48 < span.min() < 0.52 and 0.97 < span.max() <= 1)
        batch, whole = (next(Loader(sequences(), FIVE, 4, 6, True, augmentation=change).epoch())
                        for change in (Augmentation(crop=0.3), Augmentation()))
        self.assertFalse(batch.x.equal(whole.x))

    def test_pose(self):
        """The same frames centred one by one, turned, not changed but for mirror images."""
        change = Augmentation(rotation=60, scaling=0.2, shift=0.2, flip=0.5, noise=0.1, crop=0.5)
        mirror = Augmentation(flip=0.5, crop=0.5)
        hands = FIVE | dict(parts=dict(torso=[0, 1, 2]))  # turned until they lie along x
        for training, box in product((True, False), (False, True)):
            front = {"box": box, "center": "frame", "turn": True}
            changed, mirrored, plain = (
                next(Loader(sequences(), hands, 20, 6, training, **how).epoch())
                for how in (dict(augmentation=change, view={"box": box}, pose=True),
                            dict(augmentation=mirror, view=front),
                            dict(augmentation=change, view={"box": box})))
            close(changed.target, mirrored.x)
            close(changed.unit, mirrored.unit)
            equal(changed.x, plain.x)
            equal(plain.target, plain.x)
            self.assertGreater((changed.x - changed.target).abs().mean(), 0.1)
            across = changed.target[:, 0, :, 1] - changed.target[:, 0, :, 2]
            self.assertLess(across[..., 2].mean(1).abs().max(), 1e-4)

    def test_normalise_against_loops(self):
        """Origin: the centre joints of whom frames show; unit: the RMS distance of seen joints."""
        for C in (2, 3):
            x = 5 * torch.randn(3, 2, 6, 5, C) + 30
            x[1, 1] = 0
            seen = (torch.rand(3, 2, 6, 5) < 0.7) & (x != 0).any(-1)
            seen[2, 0, 1:3] = False  # out of sight
            present = torch.tensor([[True, True], [True, False], [True, True]])
            layout = FIVE | {"centre": [0, 3]}
            y, _, unit = data.normalise_frames(x, seen, present, layout)
            framed = data.normalise_frames(x, seen, present, layout, center="frame")[0]
            for n in range(3):
                close([y[n], unit[n]], plain_normalise(x[n], [0, 3], seen[n]))
                origins = [torch.stack([x[n, m, t, j] for m in range(2) if seen[n, m, t].any()
                                        for j in (0, 3)]).mean(0) for t in range(6)]
                still = (x[n] - torch.stack(origins)[:, None]) * present[n][:, None, None, None]
                squares = still.square().sum(-1)[seen[n]]
                close(framed[n], still / squares.mean().sqrt())

    def test_three_dimensions_face_the_viewer(self):
        """However they were turned: shoulders and hips along x, left at larger x, heights kept."""
        skeleton = SKELETONS["kinect20"]

        def turned(x, **view):
            return data.normalise_frames(x, x.any(-1), x.flatten(2).any(2), skeleton, **view)[0]

        x = torch.randn(1, 2, 6, 20, 3) + 4
        y = turned(x)
        for angle in (0.7, 2.5, -1.9):
            close(turned(x @ about(1, angle)), y, atol=1e-4)
        close(turned(x[..., [0, 2, 1]] * torch.tensor([1, -1, 1]), up="z"), y, atol=1e-4)
        second = torch.stack([0 * x[:, 0], x[:, 0]], 1)  # alone in the second place
        close(turned(second)[:, 1], turned(x[:, :1])[:, 0], atol=1e-4)
        across = (y[0, 0, :, [4, 12]] - y[0, 0, :, [8, 16]]).mean((0, 1))
        self.assertAlmostEqual(float(across[2]), 0, 4)
        self.assertGreater(across[0], 0)
        still, unit = plain_normalise(x[0], skeleton["centre"])
        close(y[0, ..., 1], still[..., 1], atol=1e-4)
        close(y[0].norm(dim=-1), still.norm(dim=-1), atol=1e-4)

    def test_boxed_against_loops(self):
        """Every axis from -1 to 1, not turned, whatever the augmentation; unit undoes it."""
        x = people(3, 2, 6, 5, 3, absent=[(1, 1)]) * torch.tensor([1.0, 9.0, 0.2])
        layout = FIVE | {"parts": {**FIVE["parts"], "torso": [0, 1, 2]}}  # it could be turned
        y, _, unit = data.normalise_frames(x, x.any(-1), x.flatten(2).any(2), layout, True)
        for n in range(3):
            close(y[n], plain_boxed(x[n]))
            close(y[n].diff(dim=2) * unit[n], x[n].diff(dim=2))
        changes = Augmentation(60, 0.1, 0.1, crop=0.5)
        loader = Loader(sequences(), layout, 4, 6, True, augmentation=changes,
                        view={"box": True})
        batch, = loader.epoch()
        for n in range(4):
            seen = batch.x[n][batch.seen[n]]
            close(torch.stack([-seen.amin(0), seen.amax(0)]), torch.ones(2, 3), atol=1e-4)

    def test_batch_against_plain_indexing(self):
        """A test batch is the middle frames, normalised by themselves alone, or boxed."""
        source = sequences()
        for box in (False, True):
            batch, = Loader(source, FIVE, 4, frames=6, view={"box": box}).epoch()
            for n, L in enumerate(source.length.tolist()):
                whole = source.frames[source.start[n]:source.start[n] + L].transpose(0, 1)
                x = torch.stack([whole[:, int((t + 0.5) / 6 * L)] for t in range(6)], 1)
                expected = plain_boxed(x) if box else plain_normalise(x, [0])[0]
                close(batch.x[n], expected, atol=1e-4)
                close(batch.x[n].diff(dim=2) * batch.unit[n], x.diff(dim=2), atol=1e-4)
            equal([batch.label, batch.present], [torch.arange(4), source.present])

    def test_far_from_the_origin(self):
        """float64 data at 1e6 come out of each reader and the loader as at 0."""
        x = torch.randn(2, 7, 60, dtype=torch.float64)
        for box, name in product((False, True), ("a.npz", "a.pt")):
            batches = []
            for columns in (x, x + 1e6):
                raw = columns.view(2, 7, 1, 20, 3)
                torch.save(list(raw.transpose(1, 2)), "a.pt")
                self.write("a.npz", ctr_gcn(x_train=columns))
                half = data.read(name, None).train
                batch, = Loader(half, SKELETONS["kinect20"], 2, 6, view={"box": box}).epoch()
                batches.append([batch.x, batch.unit])
            close(*batches)
            self.assertEqual(batch.x.dtype, torch.float32)

    def test_batches_depend_on_seed_epoch_and_step_alone(self):
        def epochs(*which, **options):
            loader = Loader(sequences(range(2, 13)), FIVE, 4, 6, True, **options,
                            augmentation=Augmentation(60, 0.1, 0.1, 0.5, 0.1, 0.8))
            return [[vars(batch) for batch in loader.epoch(epoch)] for epoch in which]

        expected = epochs(0, 1)
        torch.manual_seed(2)
        equal(epochs(1, 0), expected[::-1])
        for other in (epochs(0, seed=1)[0], expected[1]):
            self.assertFalse(torch.equal(other[0]["label"], expected[0][0]["label"]))
            self.assertFalse(torch.equal(other[0]["x"], expected[0][0]["x"]))
        one = Loader(sequences([9]), FIVE, 2, 6, True, repeat=4,
                     augmentation=Augmentation(noise=1))
        drawn = [batch.x for epoch in (0, 1) for batch in one.epoch(epoch)]
        for first, second in combinations(drawn, 2):
            self.assertFalse(first.equal(second))

    def test_no_sequence_is_dropped(self):
        """Each pass holds every sequence once; a last batch of one joins its neighbour."""
        for count, repeat, sizes in ((9, 1, [4, 5]), (10, 1, [4, 4, 2]), (3, 1, [3]),
                                     (5, 3, [4, 4, 4, 3]), (1, 1, [1]), (8, 2, [4] * 4)):
            source = sequences([3] * count)
            loader = Loader(source, FIVE, 4, 4, True, repeat=repeat)
            indices = [batch.label for batch in loader.epoch(3)]
            self.assertEqual(([len(index) for index in indices], loader.steps), (sizes, len(sizes)))
            for one_pass in torch.cat(indices).split(count):
                equal(one_pass.sort().values, torch.arange(count))
            testing = Loader(source, FIVE, 4, 4, False).epoch()
            equal(torch.cat([batch.label for batch in testing]), torch.arange(count))

    def test_processes_share_each_batch(self):
        """Their parts, of two sequences or more (batch norm), are the batch of one process."""
        def indices(rank, world):
            loader = Loader(sequences([3] * 18), FIVE, 7, 4, True, rank=rank, world=world)
            return [batch.label.tolist() for batch in loader.epoch(1)]

        first, second, last = indices(0, 1)  # of 7, 7 and 4, too few for three processes
        for world, whole in ((2, [first, second, last]), (3, [first, second + last])):
            parts = [indices(rank, world) for rank in range(world)]
            together = [sorted(sum(step, [])) for step in zip(*parts)]
            self.assertEqual(together, [sorted(step) for step in whole])
            self.assertTrue(all(len(step) > 1 for part in parts for step in part))

    def test_make_whole_against_loops(self):
        """From the nearest frame, the earlier of two, else the mean of the other joints."""
        marks = {"places": [[0.0, 0.0], [-1.0, 1.0]], "origin": []}
        for T in (7, 1, 9, 16):
            x = torch.randn(T, 2, 5, 2)
            seen = torch.rand(T, 2, 5) > 0.7
            seen[:, 0, 1] = True
            seen[T // 2:, 1] = False
            seen[0, 1, 2] = True
            seen[:, 0, 4] = False
            placed = ~seen & (torch.rand(seen.shape) < 0.6)
            placed[:, 0, 4] = True  # nowhere known
            x[placed] = torch.tensor(marks["places"])[torch.randint(2, (int(placed.sum()),))]
            y, ours, present, kept, filled = data.make_whole(x.clone(), seen, marks)
            self.assertTrue(present.all() and kept.all() and ours.equal(seen))
            never = []
            count = 0
            expected = x.clone()
            for m, v in grid(2, 5):
                known = [t for t in range(T) if seen[t, m].any() and not placed[t, m, v]]
                never += [(m, v)] * (not known)
                count += sum(bool(seen[t, m].any()) and t not in known for t in range(T))
                for t in range(T) if known else ():
                    nearest = min(known, key=lambda k: (abs(k - t), k))
                    expected[t, m, v] = x[nearest, m, v]
            for m, v in never:
                others = [w for w in range(5) if (m, w) not in never]
                expected[:, m, v] = expected[:, m, others].mean(1)
            close(y, expected)
            self.assertEqual(filled, count)

    def test_stick_figures(self):
        """Always the same; ten classes, two of them of two persons; a fifth of each tests. A linear
        classifier tells few by one frame or the mean pose, all by the size of the motion."""
        figures = data.load()
        equal(figures.train.frames, data.load().train.frames)
        batches = []
        for half, size in ((figures.train, 128), (figures.test, 32)):
            self.assertEqual(half.label.bincount().tolist(), [size] * 10)
            kinds = set(zip(half.label.tolist(), half.present[:, 1].tolist()))
            self.assertEqual(sorted(pair for _, pair in kinds), [False] * 8 + [True] * 2)
            batches += Loader(half, COCO, len(half), 32).epoch()
        target = F.one_hot(batches[0].label, 10).float()
        for low, high, seen in ((0, 0.65, lambda x: x[:, :, 16]), (0, 0.88, lambda x: x.mean(2)),
                                (0.97, 1, lambda x: torch.fft.rfft(x, dim=2).abs()[:, :, :7])):
            train, test = (F.pad(seen(batch.x).flatten(1), (0, 1), value=1.0) for batch in batches)
            ridge = train.T @ train + 0.1 * torch.eye(train.shape[1])
            guess = (test @ torch.linalg.solve(ridge, train.T @ target)).argmax(1)
            accuracy = float((guess == batches[1].label).float().mean())
            self.assertTrue(low < accuracy <= high, accuracy)

class PresenceTest(Case):
    """Who and what was seen, whatever the file looks like: the same sequences as without."""
    def setUp(self):
        super().setUp()
        self.x = 50 + torch.rand(4, 2, 20, 13, 2)  # (N, M, T, V, C)
        self.clean = self.load(self.x)

    def load(self, x, score=None):
        return self.read("a.pkl", pickled(pyskl(x, score)), test_fraction=0.5)

    def batches(self, dataset, **view):
        for half in (dataset.train, dataset.test):
            yield next(Loader(half, dataset.skeleton, 9, 20, view=view).epoch())

    def same(self, found, expected=None):
        for a, b in zip(self.batches(found), self.batches(expected or self.clean)):
            close([a.x, a.present], [b.x, b.present])

    def test_frames_without_anyone(self):
        """At the start, inside, at the end: dropped in each format, and counted."""
        at = [0, *range(10, 19), *range(22, 32)]  # of 34 frames
        x = torch.zeros(4, 2, 34, 13, 2)
        x[:, :, at] = self.x
        found = self.load(x)
        self.same(found)
        self.assertIn("48 frames without anyone dropped", str(found))  # the end is padding
        self.same(self.load(x, (x != 0).any(-1).float()))
        columns = x.transpose(1, 2).flatten(2)
        npz = ctr_gcn(52, x_train=columns, y_train=torch.arange(4))
        train = self.read("a.npz", npz, layout="penn13").train
        for n, (start, length) in enumerate(zip(train.start.tolist(), train.length.tolist())):
            equal(train.frames[start:start + length], self.x[n].transpose(0, 1))

    def test_a_person_out_of_sight(self):
        """Keeps the pose of the nearest frame, and counts in no origin or unit."""
        x, held = self.x.clone(), self.x.clone()
        x[:, 1, 5:9] = 0
        held[:, 1, 5:9] = self.x[:, 1, [4, 4, 9, 9]]
        for found in (self.load(x), self.load(x, (x != 0).any(-1).float())):
            for half, batch in zip((found.train, found.test), self.batches(found)):
                self.assertFalse(batch.seen[:, 1, 5:9].any())
                for n, k in enumerate(int(name[1:]) for name in half.names):
                    expected = plain_normalise(held[k], [7, 8], x[k].any(-1))
                    close((batch.x[n], batch.unit[n]), expected, atol=1e-4)

    def test_a_ghost(self):
        """A person in less than a tenth of the frames is dropped, whatever the scores."""
        x = self.x.clone()
        x[:, 1] = 0
        alone = self.load(x)
        x[:, 1, 7] = 100
        for found in (self.load(x), self.load(x, 0.1 * (x != 0).any(-1))):
            self.same(found, alone)
            self.assertIn("4 persons seen in less than a tenth of the frames dropped", str(found))

    def test_missing_joints(self):
        """At any place that ten joints of score 0 share; 0 without scores, not at the origin."""
        hidden = torch.rand(4, 2, 20, 13) < 0.2
        scores = (~hidden).float()
        zeros = self.load(self.x.masked_fill(hidden[..., None], 0), scores)
        for place in ((-1.0, -1.0), (0.5, 7.0)):
            placed = torch.where(hidden[..., None], torch.tensor(place), self.x)
            self.same(self.load(placed, scores), zeros)
        self.same(self.load(self.x.masked_fill(hidden[..., None], 0)), zeros)
        self.assertIn(f"{int(hidden.sum())} missing joints filled in", str(zeros))
        guess = self.load(self.x, scores)  # where they stand is of use
        equal(guess.train.frames, self.clean.train.frames)
        for first in (slice(None), slice(0, 1)):  # the origin of every frame, or of the first
            centred = self.x - self.x[:, :1, first, 3:4]
            found = self.load(centred)
            self.assertEqual((found.marks["origin"], found.repairs.total()), ([3], 0))
        self.assertRaisesRegex(DataError, "no joint score is above", self.load, self.x, -scores)
        scores[0] = 0  # nobody is seen: one empty person, whatever stands there
        found = self.load(self.x, scores)
        self.assertIn("1 sequences without anyone", str(found))
        for batch in (*self.batches(found), *self.batches(found, box=True)):
            self.assertTrue(batch.present.any(1).all() and batch.x.abs().max() < 9)

class AugmentationTest(Case):
    def setUp(self):
        super().setUp()
        x = people(300, 2, 4, 5, 3, absent=[(n, 1) for n in range(0, 300, 2)])
        self.there = x.flatten(3).any(3)
        self.present = self.there.any(2)
        self.x = self.change(x)

    def change(self, x, skeleton=FIVE, **settings):
        """x normalised, which leaves what is normalised already, and augmented."""
        generator = torch.Generator().manual_seed(0)
        seen = self.there[..., None].expand(x.shape[:4])
        mirrored = torch.rand(len(x), generator=generator) < settings.get("flip", 0)
        return data.normalise_frames(x, seen, self.present, skeleton, generator=generator,
                                     mirrored=mirrored, augmentation=Augmentation(**settings))[0]

    def test_zeros_stay(self):
        close(self.change(self.x), self.x)
        y = self.change(self.x, rotation=60, scaling=0.1, shift=0.1, noise=0.1)
        self.assertFalse(y[~self.there].any())
        self.assertGreater((y - self.x)[self.there].abs().mean(), 0.1)

    def test_rotation(self):
        """One a sequence: R_x(r) R_y(y), y up to 60 degrees, r up to 30; none in 2D."""
        y = self.change(self.x, rotation=60)
        R = torch.linalg.lstsq(self.x.flatten(1, 3), y.flatten(1, 3)).solution.mT
        turn = torch.atan2(R[:, 0, 2], R[:, 0, 0])
        tilt = torch.atan2(R[:, 2, 1], R[:, 1, 1])
        for n in range(300):
            close(R[n], about(0, tilt[n]) @ about(1, turn[n]), atol=1e-4)
        for angle, limit in ((turn, math.pi / 3), (tilt, math.pi / 6)):
            self.assertTrue(0.9 * limit < min(-angle.min(), angle.max()))
            self.assertLess(angle.abs().max(), limit)
        flat = self.x[..., :2]
        equal(self.change(flat, rotation=60), self.change(flat))

    def test_flip(self):
        """x is negated, left and right joints are swapped; of half of the sequences."""
        mirror = self.x[..., [0, 2, 1, 4, 3], :] * torch.tensor([-1.0, 1, 1])
        close(self.change(self.x, flip=1), mirror)
        unpaired = self.x * torch.tensor([-1.0, 1, 1])
        close(self.change(self.x, FIVE | {"pairs": []}, flip=1), unpaired)
        y = self.change(self.x, flip=0.5)
        flipped = ((y - mirror).abs() < 1e-3).flatten(1).all(1)
        close(y[flipped], mirror[flipped])
        close(y[~flipped], self.x[~flipped])
        self.assertTrue(110 < flipped.sum() < 190)

    def test_scaling_shift_and_noise(self):
        """Scaling and shift are one number a sequence and axis, noise is Gaussian."""
        for found in (self.change(self.x, scaling=0.1) / self.x - 1,
                      self.change(self.x, shift=0.1) - self.x):
            found = found.masked_fill(self.x.abs() < 0.05, math.nan)  # a ratio of rounding
            mean = found.flatten(1, 3).nanmean(1)  # (N, C)
            apart = (found - mean[:, None, None, None]).nan_to_num()
            close(apart, torch.zeros_like(apart), atol=1e-3)
            self.assertTrue(-0.101 < mean.min() < -0.095 and 0.095 < mean.max() < 0.101)
            self.assertGreater((mean[:, 0] - mean[:, 1]).abs().max(), 0.05)
        noise = (self.change(self.x, noise=0.2) - self.x)[self.there]
        self.assertTrue(abs(noise.mean()) < 0.01 and abs(noise.std() - 0.2) < 0.01)
        self.assertGreater(len(noise.unique()), 0.9 * noise.numel())

# ------------------------------------------------------------------------------ the scripts

TINY = "--device cpu --no-amp --width 8 --hidden 8 --layers 1 --frames 8 --eval-every 1"
CLASSIFIER = "--strl-layers 2 --blocks 1"
STACK = "--pretrain stack --blocks 1"
load = partial(torch.load, weights_only=True)

def settings_of(script, line="", dataset=None):
    """The settings of a command line and, of a data set, those that depend on it."""
    typed = train_pretrain.parse(script.Settings, "", line.split())
    settings = train_pretrain.settle(script.Settings, typed)
    return train_pretrain.suit(settings, dataset) if dataset else settings

def figures(C=2):
    """80 + 20 stick figures; C 3: a third coordinate of zeros."""
    dataset = data.load(synthetic_size=100)
    frames = F.pad(dataset.train.frames, (0, C - 2))
    return replace(dataset, train=replace(dataset.train, frames=frames),
                   test=replace(dataset.test, frames=frames))

class MeasureTest(Case):
    def test_defaults_are_supplement_a(self):
        for script, expected in (
                (train_pretrain, dict(lr=1.5e-4, batch_size=1024, epochs=50, dropout=0.2, layers=3,
                                      beta=2, mask_parts=("right_arm", "right_leg"))),
                (train_finetune, dict(lr=0.1, optimizer="sgd", momentum=0.9, weight_decay=0.005,
                                      batch_size=128, epochs=110, warmup=5, milestones=(90, 100),
                                      label_smoothing=0.1, dropout=0.2, attention_dropout=0.1,
                                      layers=3, strl_layers=3))):
            settings = vars(settings_of(script, "", figures()))
            self.assertEqual(settings, settings | expected | {"frames": 64})

    def test_recipe_small(self):
        """What it stands for in 2D and 3D; nothing else changes, and what is typed wins."""
        shape = dict(recipe="small", frames=16, hidden=64, blocks=1, motion=True, bone=True,
                     crop=0.3)
        flat = dict(box=False, rotation=0.0, scaling=0.1, shift=0.1, flip=0.5, noise=0.01)
        solid = flat | dict(rotation=30.0, flip=0.0, noise=0.0)
        boxed = solid | dict(box=True, rotation=60.0, scaling=0.0, shift=0.0)
        typed = dict(frames=24, motion=False, box=False, flip=0.1, repeat=2, lr=7.0, scaling=0.1,
                     shift=0.1)
        line_typed = "--frames 24 --no-motion --no-box --flip 0.1 --repeat 2 --lr 7"
        in_2d, in_3d = figures(2), figures(3)
        for script, own, repeat in (
                (train_pretrain, dict(batch_size=32, lr=1e-3), 32),  # of 50 epochs and 2.5 steps
                (train_finetune, dict(batch_size=16, optimizer="adamw", lr=3e-3, clip=5.0,
                                      weight_decay=0.05), 8)):       # of 110 epochs and 5 steps
            paper = vars(settings_of(script, "", in_2d))
            for dataset, alone, small in ((in_2d, flat, flat), (in_3d, solid, boxed)):
                for line, expected in (
                        ("", alone | dict(repeat=1)),
                        ("--recipe small", shape | own | small | dict(repeat=repeat)),
                        (f"--recipe small {line_typed}", shape | own | small | typed)):
                    found = vars(settings_of(script, line, dataset))
                    self.assertEqual(found, paper | expected)
        unpaired = replace(in_2d, skeleton=STAR | {"pairs": []})
        self.assertEqual(settings_of(train_pretrain, "", unpaired).flip, 0)

    def test_pretrain_stack(self):
        """Ours: whole STRL layers, a fifth of the joints masked, 100 passes at most by itself."""
        for C, line, ratio, repeat, strl in (
                (2, "", 0.2, 1, dict(frames=64, blocks=2, stride=2)),
                (3, "--recipe small", 0.2, 2, dict(frames=16, blocks=1, stride=2)),
                (3, "--recipe small --epochs 18", 0.2, 5, dict(frames=16, blocks=1, stride=2)),
                (3, "--recipe small --epochs 200", 0.2, 1, dict(frames=16, blocks=1, stride=2)),
                (3, "--mask-ratio 0.3 --stride 1", 0.3, 1, dict(frames=64, blocks=2, stride=1))):
            dataset = figures(C)
            paper, stack = (settings_of(train_pretrain, f"{line} {flag}", dataset)
                            for flag in ("", "--pretrain stack"))
            changed = dict(pretrain="stack", mask_ratio=ratio, repeat=repeat)
            self.assertEqual(vars(stack), vars(paper) | changed)
            plain, found = (train_pretrain.pretraining_arguments(settings, dataset)
                            for settings in (paper, stack))
            strl |= dict(persons=2, strl_layers=3)
            self.assertEqual(found, plain | dict(mask_ratio=ratio, strl=strl))
            SkeletonMAE(**found)

    def test_a_gpu_holds_a_pickle_once(self):
        """Both halves are one tensor, on a device too; more than half of its memory stays here."""
        dataset = figures()
        size = dataset.train.frames.nbytes
        for free, moves in ((2 * size, True), (2 * size - 2, False)):
            with (patch.object(torch.cuda, "mem_get_info", lambda device: (free, 0)),
                  patch.object(torch.Tensor, "to", lambda x, device: x.clone())):
                moved = train_pretrain.to_device(dataset, torch.device("cuda"))
            self.assertEqual(moved.train.frames is not dataset.train.frames, moves)
            self.assertIs(moved.test.seen, moved.train.seen)
            self.assertIs(moved.test.frames, moved.train.frames)

    def test_learning_rate_of_all_epochs(self):
        expected = [0.02, 0.04, 0.06, 0.08, 0.1] + [0.1] * 85 + [0.01] * 10 + [0.001] * 10
        close([train_finetune.learning_rate(e, 0.1, 5, (90, 100)) for e in range(110)], expected)
        for line, milestones in (("--milestones 3,5", (3, 5)), ("--epochs 22", (18, 20)),
                                 ("--epochs 1", (1, 1))):
            settings = settings_of(train_finetune, line, figures())
            self.assertEqual(settings.milestones, milestones)

    def test_label_subset(self):
        """Of each class round(fraction x size), at least one; another choice for another seed."""
        labels = torch.tensor([0] * 40 + [3] * 11 + [2] * 2)[torch.randperm(53)]
        for fraction, counts in ((0.1, [4, 1, 1]), (0.26, [10, 1, 3]), (0.5, [20, 1, 6])):
            kept = train_finetune.label_subset(labels, fraction, 0)
            self.assertEqual([labels[kept].tolist().count(c) for c in (0, 2, 3)], counts)
            self.assertEqual(kept.tolist(), sorted(set(kept.tolist())))
            equal(kept, train_finetune.label_subset(labels, fraction, 0))
        self.assertFalse(kept.equal(train_finetune.label_subset(labels, 0.5, 1)))

    def test_metrics_against_loops(self):
        """Top-1, top-5 and the mean of the accuracies of the classes present, in percent."""
        labels = [0] * 30 + [1] * 20 + [5] * 10
        logits = torch.randn(60, 8) + F.one_hot(torch.tensor(labels), 8)
        ranked = [sorted(range(8), key=lambda k: -row[k]) for row in logits.tolist()]
        right = [order[0] == label for order, label in zip(ranked, labels)]
        top5 = 100 * sum(label in order[:5] for order, label in zip(ranked, labels)) / 60
        mean = (sum(right[:30]) / 30 + sum(right[30:50]) / 20 + sum(right[50:]) / 10) / 3
        found = train_finetune.metrics({"logits": logits, "labels": torch.tensor(labels)})
        close(found, dict(top1=100 * sum(right) / 60, top5=top5, mean_class=100 * mean))

    def test_measures_against_loops(self):
        """Target and mean pose over seen joints; errors of masked joints, in file units."""
        model = SkeletonMAE(FIVE, 3, 8, 8, mask_parts=("right_arm", "left_leg")).eval()
        source = sequences([5, 9, 3, 12, 2])
        source.seen[2:4, 1] = False  # out of sight for two frames
        source.seen[1, 0, 2] = False
        for pose in (False, True):
            loader = Loader(source, FIVE, 3, 6, False, pose=pose)
            mean, spread, mean_pose = train_pretrain.measure_target(loader)
            poses = {(m, v): [] for m, v in grid(2, 5)}
            errors = []
            for batch in loader.epoch():
                for n, m, t, v in grid(len(batch.x), 2, 6, 5):
                    x = batch.target[n, m, t]
                    if batch.seen[n, m, t, v]:
                        poses[m, v].append(x[v])
                        if v in (2, 3):
                            errors.append((mean_pose[m, v] - x[v]).norm() * batch.unit[n])
            for v in range(5):
                seen = torch.stack(poses[0, v] + poses[1, v])
                close(mean[v], seen.mean(0))
                close(spread[v], (seen - seen.mean(0)).square().sum(-1).mean().sqrt())
                for m in range(2):
                    close(mean_pose[m, v], torch.stack(poses[m, v]).mean(0))
            found = train_pretrain.reconstruction_error(model, loader, mean_pose)
            close(found["mean_pose_error"], float(sum(errors) / len(errors)))

def save_halves(path, x, y, count):
    """A .pt file of sequences (M, T, V, C) with their labels; the first `count` of them train."""
    annotations = [dict(keypoint=keypoint, label=label) for keypoint, label in zip(x, y)]
    names = list(range(len(annotations)))
    split = dict(train=names[:count], test=names[count:])
    torch.save(dict(annotations=annotations, split=split), path)

class ScriptCase(Case):
    """Both scripts as a user runs them, on 25 + 12 sequences of FIVE, in a folder of their own."""
    def setUp(self):
        super().setUp()
        x = [torch.randn(1 + n % 2, 6 + n % 5, 5, 3) + n % 3 for n in range(37)]
        save_halves("tiny.pt", x, [n % 3 for n in range(37)], 25)
        self.write("five.json", json.dumps(FIVE).encode())
        self.data = "--data tiny.pt --layout five.json"

    def script(self, module, line: str, status: int) -> str:
        """What it prints or, where it fails, its one line on stderr."""
        printed, errors, ended = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            try:
                train_pretrain.run(lambda: module.main(line.split()))
            except SystemExit as end:
                ended = end.code
        message = errors.getvalue().strip()
        self.notes = re.findall("note: .*", message)  # of --predict, whose stdout is a table
        lines = len(message.splitlines()) - len(self.notes)
        self.assertEqual((ended, lines), (status, int(status > 0)), message)
        return message if status else printed.getvalue()

    def pretrain(self, line: str, status=0) -> str:
        return self.script(train_pretrain, line if "--resume" in line else f"{TINY} {line}", status)

    def finetune(self, line: str, status=0) -> str:
        if "--eval-only" in line:
            line = f"--device cpu --no-amp {line}"
        elif "--ckpt" in line:
            line = f"--device cpu --no-amp {CLASSIFIER} --frames 8 --eval-every 1 {line}"
        elif "--resume" not in line:
            line = f"{TINY} {CLASSIFIER} {line}"
        return self.script(train_finetune, line, status)

    def same_run(self, one: str, other: str, name="pretrain"):
        a, b = (load(f"{folder}/{name}.pt") for folder in (one, other))
        for key in ("model", "log", "epoch"):
            equal(a[key], b[key])
        equal(a["optimizer"]["state"], b["optimizer"]["state"])
        self.assertEqual(*(Path(f"{folder}/log.csv").read_text() for folder in (one, other)))

class Adam(dict):
    """Of each parameter the two moments and the number of steps."""
    def change(self, p, g):
        first, second, steps = self.get(p, (0, 0, 0))
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g.square()
        self[p] = (first, second, steps + 1)
        root = (second / (1 - 0.999 ** (steps + 1))).sqrt() + 1e-8
        return first / (1 - 0.9 ** (steps + 1)) / root

class ScriptTest(ScriptCase):
    def test_pretrain_then_finetune(self):
        """Bare --ckpt takes the newest pre-training and its data; log and outputs agree."""
        printed = self.pretrain(f"{self.data} --epochs 1 --repeat 1 --out runs/old "
                                f"{STACK} --recipe small")
        self.assertIn("--ckpt runs/old/pretrain.pt --recipe small --lr 1e-3 --encoder-lr-scale 0.3",
                      printed)
        os.utime("runs/old/pretrain.pt", (1, 1))
        self.assertIn("joint_error", self.pretrain(f"{self.data} --epochs 2 --batch-size 8"))
        printed = self.finetune("--ckpt --epochs 3 --batch-size 8 --drop-path 0.3")
        self.assertIn("runs/pretrain/pretrain.pt", printed)
        trained = load("runs/finetune/finetune.pt")
        self.assertEqual(trained["model_settings"]["drop_path"], 0.3)
        rows = list(csv.DictReader(open("runs/finetune/log.csv")))
        self.assertEqual(len(rows), 3)
        self.assertTrue(all(v == f"{float(v):.6g}" for row in rows for v in row.values() if v))
        measured = "top-1 {top1:.2f} %, mean class accuracy {mean_class:.2f} %"  # of 3 classes
        self.assertIn(measured.format(**trained["log"][-1]), printed)
        outputs = load("runs/finetune/test_outputs.pt")
        self.assertEqual(outputs["labels"].tolist(), [n % 3 for n in range(25, 37)])
        logits = outputs["features"] @ trained["model"]["head.weight"].T
        close(logits + trained["model"]["head.bias"], outputs["logits"])
        printed = self.finetune("--ckpt runs/finetune/finetune.pt --eval-only --out again")
        self.assertIn(measured.format(**trained["log"][-1]), printed)
        close(load("again/test_outputs.pt")["logits"], outputs["logits"])
        fp32 = train_finetune.start(dict(ckpt="runs/finetune/finetune.pt", eval_only=True))[0]
        self.assertIs(fp32.amp, False)  # as it was trained, on any device

    def test_fine_tuning_by_hand(self):
        """Three steps of SGD and AdamW written out, each with another learning rate."""
        for flags in ("--lr 0.1 --weight-decay 0.1 --momentum 0.8", "--nesterov --clip 0.3",
                      "--lr 0.01 --weight-decay 2 --label-smoothing 0.3 --optimizer adamw"):
            line = (f"{self.data} {TINY} {CLASSIFIER} --epochs 3 --warmup 2 --milestones 2 "
                    f"--dropout 0 --attention-dropout 0 {flags}")
            dataset = data.load("tiny.pt", layout="five.json")
            settings = settings_of(train_finetune, line, dataset)
            torch.manual_seed(0)
            model = train_finetune.make_model(settings, dataset, None)[0].train()
            train = train_pretrain.loader(settings, dataset, dataset.train, 25, True)
            smooth = settings.label_smoothing
            adam = Adam()
            velocity = {}
            for epoch, lr in enumerate((settings.lr / 2, settings.lr, settings.lr / 10)):
                batch, = train.epoch(epoch)
                target = (1 - smooth) * F.one_hot(batch.label, 3) + smooth / 3
                logits = model(batch.x, batch.present)
                loss = -(target * logits.log_softmax(1)).sum(1).mean()
                learned = [p for p in model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(loss, learned)
                norm = sum(g.square().sum() for g in grads).sqrt()
                for p, g in zip(learned, grads):
                    if settings.clip:
                        g = g * min(1, settings.clip / float(norm))
                    if settings.optimizer == "adamw":
                        change = adam.change(p, g) + settings.weight_decay * p
                    else:
                        g = g + settings.weight_decay * p
                        velocity[p] = settings.momentum * velocity.get(p, 0) + g
                        change = velocity[p]
                        if settings.nesterov:
                            change = g + settings.momentum * velocity[p]
                    p.data -= lr * change.detach()
            self.finetune(f"{line} --out run")
            trained = load("run/finetune.pt")["model"]
            for name, p in model.named_parameters():  # Adam's steps magnify rounding
                close(trained[name], p.detach(), rtol=5e-3, atol=5e-3)

    def test_pretraining_by_hand(self):
        """Two steps of Adam on micro-batches of 7, 6, 6 and 6: batch norm sees each alone. The
        stack puts back what was not augmented."""
        dataset = data.load("tiny.pt", layout="five.json")
        for flags in ("", STACK):
            line = (f"{self.data} --epochs 2 --lr 0.01 --dropout 0 --micro-batch 8 --frames 8 "
                    f"--box {flags}")
            self.pretrain(line)
            trained = load("runs/pretrain/pretrain.pt")
            settings = settings_of(train_pretrain, line, dataset)
            train = train_pretrain.loader(settings, dataset, dataset.train, 25, True)
            self.assertEqual(train.pose, bool(flags))
            torch.manual_seed(0)
            model = SkeletonMAE(**trained["model_settings"])
            for name in ("mean", "spread"):
                measured = trained["model"][name]
                self.assertFalse(measured.equal(getattr(model, name)), name)
                getattr(model, name).copy_(measured)
            adam = Adam()
            for epoch in range(2):
                train_pretrain.seed_epoch(settings, epoch, 0)
                batch, = train.epoch(epoch)
                parts = (value.split([7, 6, 6, 6])
                         for value in (batch.x, batch.present, batch.seen, batch.target))
                loss = sum(len(x) / 25 * model(x, present, None, seen, target)[0]
                           for x, present, seen, target in zip(*parts))
                grads = torch.autograd.grad(loss, list(model.parameters()))
                for p, g in zip(model.parameters(), grads):
                    p.data -= 0.01 * adam.change(p, g)
                self.assertAlmostEqual(trained["log"][epoch]["loss"], float(loss.detach()), 4)
            for name, p in model.named_parameters():
                close(trained["model"][name], p.detach(), rtol=1e-3, atol=1e-3)

    def test_what_is_pretrained(self):
        """It stays at --encoder-lr-scale 0, the rest moves; --linear-probe freezes all of it."""
        for flags, layers, fixed in (("", "", r"embedding\.|.*\.encoder\."),
                                     (STACK, "--strl-layers 3", r"embedding\.|strl\.")):
            self.pretrain(f"{self.data} --epochs 1 {flags}")
            before = load("runs/pretrain/pretrain.pt")["model"]
            self.finetune(f"--ckpt --epochs 1 --encoder-lr-scale 0 --lr 0.1 {layers}")
            first = load("runs/finetune/finetune.pt")
            equal(first["model"]["embedding.linear.weight"], before["embedding.linear.weight"])
            self.finetune("--resume --epochs 2 --milestones 1")  # these may change
            after = load("runs/finetune/finetune.pt")["model"]
            for name, p in SkeletonClassifier(**first["model_settings"]).named_parameters():
                stays = bool(re.match(fixed, name)) or not p.requires_grad
                self.assertEqual(after[name].equal(first["model"][name]), stays, name)
            self.finetune("--ckpt --linear-probe --epochs 2 --out probe")
            after = load("probe/finetune.pt")["model"]
            learned = [name for name, value in before.items()  # from batches: of unmasked joints
                       if not value.equal(after["pretrained." + name])]
            self.assertEqual({name.split(".")[-1] for name in learned},
                             {"running_mean", "running_var", "num_batches_tracked"})
            self.finetune("--ckpt probe/finetune.pt --eval-only --out probe")

    def test_resume_is_exact(self):
        """2 + 2 epochs equal 4, bit for bit; another setting is refused by name."""
        for script, name, flags in ((self.pretrain, "pretrain", ""),
                                    (self.pretrain, "pretrain", STACK),
                                    (self.finetune, "finetune", "--linear-probe"),
                                    (self.finetune, "finetune", ""),
                                    (self.finetune, "finetune", "--optimizer adamw")):
            line = f"{self.data} --batch-size 8 --lr 0.01 {flags}"
            script(f"{line} --epochs 4 --out whole")
            script(f"{line} --epochs 2 --out begun")
            for wrong in ("--lr 0.1", "--seed 3", "--batch-size 4"):
                self.assertIn(wrong.split()[0], script(f"--out begun --resume {wrong}", 2))
            os.remove("begun/log.csv")  # as if it had died between its checkpoint and its log
            os.rename("begun", "halves")
            script("--out halves --resume --epochs 4")
            self.same_run("whole", "halves", name)
            shutil.rmtree("halves")

    def test_killed_and_resumed(self):
        line = f"{self.data} {TINY} --batch-size 8 --epochs 30"
        command = [sys.executable, train_pretrain.__file__, *f"{line} --out killed".split()]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        while "epoch 3/" not in run.stdout.readline():
            self.assertIsNone(run.poll())
        run.kill()
        self.assertEqual(run.communicate()[1], "")  # not even torch's remark about numpy
        self.pretrain("--resume --out killed")
        self.pretrain(f"{line} --out whole")
        self.same_run("whole", "killed")

    def test_two_processes(self):
        """By torchrun: one prints; weights equal to the last bit, losses as of one process."""
        self.write("both.py", b"""
import os, sys, torch, train_finetune, train_pretrain
made = []
parallel = torch.nn.parallel.DistributedDataParallel
torch.nn.parallel.DistributedDataParallel = lambda model: made.append(model) or parallel(model)
train_pretrain.run(lambda: sys.modules[sys.argv[1]].main(sys.argv[2:]))
torch.save(dict(made[0].named_parameters()), os.environ["RANK"])
os._exit(0)  # once in fifty runs torch's threads abort as the process ends
""")
        line = f"{self.data} --dropout 0 --batch-size 7 --lr 0.01 --epochs 3"
        for script, name, flags in (  # 4 sequences of 7 here, 3 there: other numbers of passes
                (self.pretrain, "pretrain", f"{line} --micro-batch 2"),
                (self.pretrain, "pretrain", f"{line} --micro-batch 2 {STACK}"),
                (self.finetune, "finetune", f"{CLASSIFIER} {line} --attention-dropout 0")):
            script(f"{flags} --out alone")
            words = ("-m torch.distributed.run --standalone --nproc_per_node 2 both.py "
                     f"train_{name} {TINY} {flags} --out two")
            done = python(*words.split())
            self.assertEqual((done.returncode, done.stdout.count("epoch 3/3")), (0, 1), done.stderr)
            equal(load("0"), load("1"))
            alone, two = ([row["loss"] for row in load(f"{out}/{name}.pt")["log"]]
                          for out in ("alone", "two"))
            close(two, alone, rtol=0.25, atol=0.01)
            self.assertNotEqual(two, alone)

    def test_commands_of_the_docstrings(self):
        """Each runs, on tiny data; fine-tuning starts from what NTU's pre-training left."""
        y = torch.arange(8) % 2
        self.write("ntu60.npz", ctr_gcn(150, x_train=torch.rand(8, 9, 150), y_train=y))
        self.write("mine.pkl", pickled(pyskl(8)))
        self.write("new.pkl", pickled([torch.rand(1, 9, 25, 3)] * 2))
        tiny = f"{TINY} --synthetic-size 20 --repeat 1"
        for module in (train_pretrain, train_finetune):
            commands = re.findall(r"^    python (\w+)\.py *([^#>\n]*)", module.__doc__, re.M)
            self.assertGreater(len(commands), 5)
            for name, flags in commands:
                self.assertEqual(name, module.__name__)
                epochs = 2 if "--resume" in flags else 1
                printed = self.script(module, f"{flags} {tiny} --epochs {epochs}", 0)
                tests = re.search("--eval-only|--predict", flags)
                self.assertRegex(printed, "top-1|name,class,p" if tests else f"epoch {epochs}/")
            self.script(train_pretrain, f"--data ntu60.npz {tiny} --epochs 1", 0)

    def test_commands_of_the_pages(self):
        """Every flag in the README and in docs/ is known, every value within its bounds."""
        pages = [*FOLDER.glob("*.md"), *FOLDER.glob("docs/*.md")]
        text = "\n".join(page.read_text() for page in pages)
        commands = re.findall(r"python (train_\w+)\.py([^&#|`>\n]*)", text)
        self.assertGreater(len(commands), 10)
        for script, words in commands:
            with self.subTest(words):
                settings_of(sys.modules[script], words.replace("...", ""))

    def test_prediction(self):
        """--predict and load_classifier give the test's probabilities; ghosts, gaps, padding."""
        x = 50 + torch.rand(8, 2, 30, 5, 2)
        score = (torch.rand(8, 2, 30, 5) > 0.2).float()
        x[0, :, 4:9] = x[1, 1] = x[2, 1, 6:20] = x[3, :, 25:] = 0
        x[4][score[4] == 0] = -1
        score[5, 1, 2:] = 0
        score = score * x.any(-1)
        arrays = torch.cat([x, score[..., None]], -1)
        annotations, every = pyskl(x, score, 3), [f"a{n}" for n in range(8)]
        self.write("own.pkl", pickled(annotations, ["sit", "run", "eat"], train=every, test=every))
        for annotation in annotations:
            del annotation["label"]
        self.write("new.pkl", pickled(annotations))
        torch.save(arrays, "new.pt")
        for flags in ("", "--box", "--center frame"):
            self.finetune(f"--data own.pkl --layout five.json --epochs 1 --out own {flags}")
            expected = load("own/test_outputs.pt")["logits"].softmax(1)
            self.finetune("--ckpt own/finetune.pt --eval-only --out again")
            close(load("again/test_outputs.pt")["logits"].softmax(1), expected)
            classify = train_finetune.load_classifier("own/finetune.pt")
            names, found = classify(arrays)
            close(found, expected)
            self.assertLessEqual(set(names), {"sit", "run", "eat"})
            alone = classify([arrays[1, 0].double(), arrays[1, :1]])[1]  # (T, V, C), (M, T, V, C)
            close(alone, expected[[1, 1]])
            hidden, zeros = (torch.where(arrays[..., 2:] == 0, torch.tensor(place), arrays)
                             for place in ([-7.0, 5.0, 0.0], 0.0))
            close(classify(hidden)[1], classify(zeros)[1])  # a placeholder unknown in training
            os.rename("five.json", "away.json")
            for new, name in (("new.pkl", "a{}"), ("new.pt", "{}")):
                line = f"--ckpt own/finetune.pt --device cpu --predict {new}"
                printed = self.script(train_finetune, line, 0)
                self.assertRegex("; ".join(self.notes), "note: by own/finetune.pt, trained on "
                                 "own.pkl; note: 5 frames .*dropped; note: 1 persons")
                rows = [f"{name.format(n)},{names[n]},{expected[n].max():.4f}" for n in range(8)]
                self.assertEqual(printed.splitlines(), ["name,class,probability", *rows])
            os.rename("away.json", "five.json")
        self.assertNotEqual(self.script(train_finetune, f"{line} --amp", 0), printed)
        self.write("new.npz", ctr_gcn(5 * 3 * 2))
        with self.assertRaisesRegex(DataError, "5 joints in 3D; expected 5 in 2D"):
            train_finetune.main("--ckpt own/finetune.pt --predict new.npz".split())
        for wrong, words in ((x[0, ..., :1], "keypoint"),
                             (torch.rand(4, 6, 2), r"6, 2.*expected \(2, 5"),
                             (torch.rand(4, 5, 3) - 2, "no score last"),
                             (torch.rand(4, 5, 3) + 2, "no score last"), ("text", "keypoint")):
            self.assertRaisesRegex(DataError, words, classify, [wrong])

    def test_one_sequence_alone(self):
        """Placeholders and, in tests, the origin are the checkpoint's: a few may not show them."""
        names = [f"a{n}" for n in range(60)]
        x = torch.randn(60, 1, 8, 5, 2)
        x -= x[:, :, :1, :1]
        score = torch.ones(60, 1, 8, 5)
        score[:, :, :3, 4] = 0
        for scores, place in ((None, 0.0), (score, 7.0)):
            x[:, :, :3, 4] = place
            x[9, 0, 0, 4] += 1  # joint 4 is no origin of these
            few = dict(train=names[48:50], test=names[50:52])
            self.write("few.pkl", pickled(pyskl(x, scores, 3)[48:52], **few))
            every = dict(train=names[:50], test=names[50:])
            self.write("all.pkl", pickled(pyskl(x, scores, 3), **every))
            self.finetune("--data all.pkl --layout five.json --epochs 1 --overwrite")
            expected = load("runs/finetune/test_outputs.pt")["logits"]
            self.finetune("--ckpt runs/finetune/finetune.pt --eval-only --data few.pkl --out few")
            close(load("few/test_outputs.pt")["logits"], expected[:2])
            printed = self.finetune("--ckpt runs/finetune/finetune.pt --predict few.pkl")
            for row in expected[:2]:
                self.assertIn(f"{row.softmax(0).max():.4f}", printed)
            if scores is None:
                classify = train_finetune.load_classifier("runs/finetune/finetune.pt")
                close(classify([x[50]])[1], expected[:1].softmax(1))
            self.finetune("--ckpt runs/finetune/finetune.pt --data few.pkl --epochs 1 --out few "
                          "--overwrite")  # the placeholders are the checkpoint's, the origin not
            marks = {"places": [[0, 0]], "origin": [0, 4]}
            if scores is not None:
                marks = {"places": [[0, 0], [7, 7]], "origin": []}
            self.assertEqual(load("few/finetune.pt")["normalisation"]["marks"], marks)

    def test_export(self):
        """The classifier of one sequence's persons as a program, exact after saving."""
        class Deployed(SkeletonClassifier):
            def forward(self, x):
                return super().forward(x, self.packing)

        for persons in (1, 2):
            model = shaken(Deployed(FIVE, 3, 4, persons, frames=6, **SMALL))
            model.packing = Packing(torch.ones(1, persons).bool(), "cpu")
            program = torch.export.export(model, (torch.rand(1, persons, 6, 5, 3),))
            torch.export.save(program, "deployed.pt2")
            x = torch.rand(1, persons, 6, 5, 3)
            equal(torch.export.load("deployed.pt2").module()(x), model(x))

    def test_unfinished_runs_stay(self):
        """Without --resume or --overwrite; a finished one is replaced, and said to be."""
        for script, name in ((self.pretrain, "pretrain"), (self.finetune, "finetune")):
            script(f"{self.data} --epochs 2 --out run")
            self.assertIn("finished run", script(f"{self.data} --epochs 2 --out run"))
            saved = load(f"run/{name}.pt")
            saved["settings"]["epochs"] = 5
            torch.save(saved, f"run/{name}.pt")
            message = script(f"{self.data} --epochs 2 --out run", 2)
            self.assertRegex(message, r"unfinished run \(2 of 5.*--resume.*--out.*--overwrite")
            printed = self.finetune(f"--ckpt run/{name}.pt --epochs 1")
            self.assertIn(f"note: run/{name}.pt is of an unfinished run", printed)
            script(f"{self.data} --epochs 1 --out run --overwrite")
            shutil.rmtree("run")

    def test_moved_data(self):
        """A checkpoint knows its split and sequences, whatever the path; others are told."""
        annotations = pyskl(torch.rand(12, 1, 6, 13, 2))
        names = [f"a{n}" for n in range(12)]
        splits = dict(train=names[:6], test=names[6:], b_train=names[6:], b_val=names[:6])
        self.write("two.pkl", pickled(annotations, **splits))
        others = [dict(a, frame_dir="x" + a["frame_dir"]) for a in annotations]
        self.write("other.pkl", pickled(others, b_train=["xa0", "xa1"], b_val=["xa2"]))
        self.finetune("--data two.pkl --split b --epochs 1")
        os.rename("two.pkl", "há\udcff.pkl")
        fine = "--ckpt runs/finetune/finetune.pt --eval-only --out e --data"
        printed = self.finetune(f"{fine} há\udcff.pkl")
        self.assertIn("b_train / b_val", printed)
        self.assertNotIn("note:", printed)
        printed = self.finetune(f"{fine} há\udcff.pkl --split train,test")
        self.assertIn("note: the checkpoint is of another split of the data: its training", printed)
        self.assertIn("of other data", self.finetune(f"{fine} other.pkl"))
        self.finetune("--resume --data há\udcff.pkl --epochs 2")
        self.finetune("--resume --epochs 3")
        message = self.finetune("--resume --data other.pkl --epochs 4", 2)
        self.assertIn("of other data; --resume", message)
        self.write("two.pkl", pickled(annotations, **{"a, b_train": names[:6], "a, b_val": names}))
        self.finetune("--data two.pkl --epochs 1 --overwrite")
        self.assertIn("a, b_train / a, b_val", self.finetune("--resume --epochs 2"))

    def test_labels_and_tests_are_optional(self):
        """In pre-training; fine-tuning leaves out what has no label, and asks for one of each half.
        Another set of classes has a new head."""
        def line(annotations, **split):
            self.write("a.pkl", pickled(annotations, **split))
            return "--data a.pkl --layout five.json --epochs 1"

        x = torch.rand(12, 1, 6, 5, 2)
        bare = [dict(keypoint=each, frame_dir=f"a{n}") for n, each in enumerate(x)]
        self.assertIn("epoch 1/1", self.pretrain(line(bare, train=["a0", "a1", "a2"])))
        self.assertIn("joint_error", self.pretrain(line(bare)))
        self.assertIn("none of 10 train sequences", self.finetune(line(bare), 2))
        self.assertIn("none of 0 test sequences", self.finetune(line(pyskl(x[:1])), 2))
        some = [dict(each, label=n % 2 if n in (1, 4, 5, 9) else None)
                for n, each in enumerate(bare)]
        printed = self.finetune(line(some, train=[f"a{n}" for n in range(8)], test=["a8", "a9"]))
        self.assertIn("note: 5 train sequences without a label left out", printed)
        self.assertIn("note: 1 test sequences without a label left out", printed)
        self.assertIn("on 1 test sequences", printed)
        printed = self.finetune(line(pyskl(x), train=["a0", "a2"], test=["a4", "a1", "a3"]))
        self.assertIn("note: 2 test sequences are of classes without a training sequence", printed)
        self.finetune(f"--ckpt runs/finetune/finetune.pt --out new {line(pyskl(x, classes=3))}")
        new = load("new/finetune.pt")
        self.assertEqual(new["classes"], ["0", "1", "2"])
        self.assertNotIn("head.weight", new["pretrained"])

    def test_doubts(self):
        """z-up data, persons who change places, long paths: a note each; its flag mends it."""
        x = torch.randn(40, 2, 32, 25, 3) * 0.3 + torch.tensor([[[0.0]], [[5.0]]])[..., None]
        x[..., 1] += 3 * torch.tensor([j in (2, 3) for j in range(25)])
        swapped = x.clone()
        swapped[:, :, ::4] = x[:, :, ::4].flip(1)
        path = x + torch.linspace(0, 40, 32)[:, None, None]
        for changed, words, mended in (
                (x, "", {}), (swapped, "persons change places in .*", None),
                (path, "people travel far; .*--center frame", {"center": "frame"}),
                (x[..., [0, 2, 1]], "head and hips differ along z; .*--up z", {"up": "z"})):
            loaded = self.read("a.pkl", pickled(pyskl(changed)))
            found = "\n".join(train_pretrain.doubts(loaded, {}))
            self.assertRegex(found, rf"\A{words}\Z")
            if mended is not None:
                self.assertEqual(list(train_pretrain.doubts(loaded, mended)), [])

    def test_notes(self):
        """A guessed layout, a score among the coordinates, few steps; else none."""
        x = 100 + torch.rand(20, 1, 4, 17, 3)
        x[..., 2] -= 100
        x[:, :, 1, 5] = 0
        save_halves("odd.pt", x, [0, 1] * 10, 10)
        printed = self.pretrain("--data odd.pt --epochs 1")
        for words in ("h36m17 is a guess from 17 joints in 3D; .*hip_centre, .*--layout",
                      "third coordinate .*score", "1 steps .*--recipe small"):
            self.assertRegex(printed, f"note: .*{words}")
        self.assertEqual(printed.count("note:"), 3)
        self.assertIn("20 missing joints filled in", printed)
        small = f"{self.data} --recipe small --repeat 2 --out new --epochs"
        self.assertNotIn("note:", self.pretrain(f"{small} 1"))
        self.assertNotIn("note:", self.finetune(f"{small} 2"))

    def test_odd_surroundings(self):
        """A terminal that lacks a character of the path; WORLD_SIZE without torchrun."""
        os.rename("tiny.pt", "日本.pt")
        line = f"{TINY} --data 日本.pt --layout five.json --epochs 1"
        for variable, status in (({"PYTHONIOENCODING": "cp1252"}, 0), ({"WORLD_SIZE": "2"}, 2)):
            done = python(train_pretrain.__file__, *line.split(), **variable)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (status, status // 2))
        self.assertRegex(done.stderr, "^error: .*torch.distributed.*RANK expected")

    def test_bfloat16_by_default(self):
        """Where the CPU has instructions for it; off where torch cannot tell, or --no-amp."""
        line = f"{TINY} {self.data} --epochs 1"
        for found, flag, expected in (
                (dict(avx512_bf16=True), "", True), (dict(amx_bf16=True), "", True),
                (dict(avx2=True, avx512_bf16=False), "", False), (dict(), "", False),
                (dict(amx_bf16=True), "--no-amp", False), (dict(), "--amp", True)):
            with patch.object(torch.cpu, "get_capabilities", lambda: found, create=True):
                printed = self.script(train_pretrain, line.replace("--no-amp", flag), 0)
            self.assertEqual("in bfloat16" in printed, expected)

    def test_bad_command_lines(self):
        self.pretrain(f"{self.data} --epochs 1")
        self.finetune("--ckpt --epochs 2")
        before = {path: path.read_bytes() for path in Path("runs").glob("*/*")}
        x = torch.ones(4, 2, 4, 5, 3)
        for name, change, y in (("flat", x[..., :2], [0, 1]), ("four", x, [0, 3]),
                                ("mixed", [x[0], x[1, :, :, 1:], *x[2:]], [0, 1]),
                                ("nan", [*x[:2], *x[2:] / 0], [0, 1])):
            save_halves(f"{name}.pt", change, 2 * y, 2)
        torch.save(load("runs/pretrain/pretrain.pt") | {"format": 1}, "old.pt")
        for name, content in (("text.txt", b"hello"), ("no.npz", b"hello"),
                              ("cut.npz", ctr_gcn()[:-300]), ("cut.pkl", pickled(pyskl())[:-40]),
                              ("no_x.npz", ctr_gcn().replace(b"x_train", b"z_train")),
                              ("evil.pkl", b"cos\nsystem\n(S'touch ran'\ntR."),
                              ("named.pkl", pickled(pyskl(), a_train=["a0"], a_val=["a1"]))):
            self.write(name, content)
        pretraining = (
            ("--data named.pkl --split xsub", "xsub.*a_train, a_val"), ("--data no.npz", "no.npz"),
            ("--data absent.npz", "No such.*absent.npz"), ("--mask-parts right_arm,tail", "tail"),
            ("--data text.txt", "text.txt.*npz.*pkl.*pt"), ("--out text.txt/deeper", "text.txt"),
            ("--data no_x.npz", "no x_train.*x_test"), ("--data nan.pt", "sequence 2.*infinite"),
            ("--data mixed.pt", r"'1': .* \(4, 3\); in"), ("--data tiny.pt", "5 joints.*--layout"),
            ("--resume --out nowhere", "nowhere"), ("--layout nonsense", "nonsense"),
            ("--data evil.pkl", "os.system"), ("--batch-size", "--batch-size"), ("stray", "stray"),
            ("--data cut.npz", "cut.npz"), ("--data cut.pkl", "cut.pkl"), ("--lr -1", "--lr"),
            ("--epochs x", "--epochs.*x"), ("--mask-ratio 1", "ratio"), ("--epoch 3", "--epoch"),
            ("--test-fraction 1", "float from 0.01 to 0.99"))
        pre = "--ckpt runs/pretrain/pretrain.pt"
        fine = "--ckpt runs/finetune/finetune.pt --eval-only"
        finetuning = (
            (f"{pre} --motion", "--motion True differs from False"),
            (f"{pre} --data named.pkl --split a", "13 joints in 2D; expected 5 in 3D"),
            (f"{fine} --data four.pt --layout five.json", "'1', '2'.*'0', '3'"),
            (f"{pre} --data flat.pt --layout five.json", "5 joints in 2D; expected 5 in 3D"),
            (f"{pre} --eval-only", "pretrain"), (f"{fine} --linear-probe", "--linear"),
            ("--nesterov --momentum 0", "Nesterov"), (f"{fine} --width 16", "--width"),
            (f"{fine} --strl-layers 3", "--strl-layers 3"), ("--milestones 3,-1", "--milestones"),
            (f"{pre} --box", "--box True"), (f"{fine} --frames 9", "--frames 9"),
            ("--ckpt text.txt", "text.txt is damaged"), ("--ckpt absent.pt", "No such.*absent.pt"),
            ("--ckpt old.pt", "old.pt: it holds a pretrain run, format 1; expected"),
            ("--device tpu", "device.*tpu"), ("--eval-only", "--ckpt"), ("--predict a", "--ckpt"),
            ("--mask-ratio 0.3", "--mask-ratio"), ("--momentum 2", "expected float from 0 to 1"),
            ("--scaling 1", "--scaling.*0.9"), ("--dropout 1", "--dropout.*0.99"),
            ("--clip -1", "expected float from 0 to inf"))
        for script, lines in ((self.pretrain, pretraining), (self.finetune, finetuning)):
            for line, words in lines:
                with self.subTest(line):
                    self.assertRegex(script(line, 2), rf"^error: .*{words}")
        self.assertEqual({path: path.read_bytes() for path in Path("runs").glob("*/*")}, before)

    def test_interrupted(self):
        with patch.object(train_pretrain, "measure_target", side_effect=KeyboardInterrupt):
            self.assertIn("--resume", self.pretrain(f"{self.data} --epochs 1", 130))  # Ctrl-C

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        for script, name in ((self.pretrain, "pretrain"), (self.finetune, "finetune")):
            message = script(f"{self.data} --lr 1e30 --epochs 5 --out blown", 2)
            epoch = int(re.search(r"not finite in epoch (\d), step 1;", message)[1])
            self.assertEqual(load(f"blown/{name}.pt")["epoch"], epoch - 2)
            message = script(f"{self.data} --lr 1e30 --batch-size 8 --out soon", 2)
            self.assertIn("not finite in epoch 1, step 2;", message)
            self.assertFalse(os.path.exists(f"soon/{name}.pt"))

    def test_a_failed_write_keeps_the_file(self):
        for raised in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            self.write("kept", b"old")
            with patch("os.replace", side_effect=raised), self.assertRaises(type(raised)):
                train_pretrain.write_atomically("kept", b"new")
            self.assertEqual([path.read_bytes() for path in Path().glob("kept*")], [b"old"])

if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small, and two threads wait for each other
    result = unittest.main(exit=False, warnings="ignore").result
    failed = {getattr(test, "test_case", test) for test, _ in result.failures + result.errors}
    passed = result.testsRun - len(failed) - len(result.skipped)
    print(f"{passed} passed, {len(failed)} failed, {len(result.skipped)} skipped", flush=True)
    sys.exit(not result.wasSuccessful())
