"""Every command, given what it can't work with: exit code 2, one line that says what to do, and nothing made, changed or lost.

The rows are the table of docs/wrong-inputs.md. ``python -m tests.cli.test_wrong_inputs`` writes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

import gradloc
from gradloc.cli.commands import COMMANDS
from gradloc.cli.main import main
from gradloc.core.checkpoint import save_state
from tests.conftest import make_net, train

PAGE = Path(__file__).parents[2] / "docs" / "wrong-inputs.md"


@dataclass(frozen=True)
class Row:
    """What is wrong, the words as typed, and the line on standard error after ``gradloc: `` (``…`` for anything)."""

    wrong: str
    words: tuple[str, ...]
    says: str

    @property
    def typed(self) -> str:
        return " ".join(self.words)


def row(wrong: str, *words: str, says: str) -> Row:
    return Row(wrong, words, says)


_RUN = "run=runs/a"
_LONG = "n" * 300
ROWS = [
    # ---- the command line itself
    row("a command that there isn't", "msks", says="'msks' is not a command; did you mean masks? Commands: demo, …"),
    row("a word without =", "report", "runs/a", says="'runs/a' is not of the form key=value; did you mean run=? Example: gradloc report run=runs/demo"),
    row("a setting without a value", "masks", _RUN, "density", says="'density' is not of the form key=value; did you mean density=? Example: …"),
    row("a setting as an option", "masks", _RUN, "--density=0.5", says="masks has no setting '--density'; did you mean density=? Settings: run, …"),
    row("an unknown setting", "masks", _RUN, "densty=0.5", says="masks has no setting 'densty'; did you mean density=? Settings: run, …"),
    row("a setting of Hydra's own", "analyze", _RUN, "hydra.run.dir=/tmp", says="analyze has no setting 'hydra.run.dir'. Settings: run, …"),
    row("Hydra's + before a setting", "masks", "+run=runs/a", says="masks has no setting '+run'; did you mean run=? Settings: …"),
    row("Hydra's ~ before a setting", "masks", _RUN, "~density", says="'~density' is not of the form key=value; did you mean density=? Example: …"),
    row("a setting twice", "masks", _RUN, "density=0.5", "density=0.3", says="density is given more than once; keep one."),
    row("what a command needs is missing", "verify", "run=runs/a", says="verify needs plan=. Example: gradloc verify plan=…"),
    row("the environment, through Hydra", "report", "run=${oc.env:HOME}", says='run=${oc.env:HOME}: ${…} is not read here; let your shell put the value in, as in run="$NAME".'),
    row("a resolver of Hydra's", "masks", _RUN, "density=${oc.decode:0.5}", says="density=${oc.decode:0.5}: ${…} is not read here; …"),
    row("several values where one goes", "masks", _RUN, "density=0.3,0.5", says="density=0.3,0.5 has several values; add --multirun to run masks once with each."),
    row("several runs where one goes", "analyze", "run=runs/a,runs/b", says="run=runs/a,runs/b has several values; add --multirun to run analyze once with each, or put a name with a comma in quotes within quotes: …"),
    row("a list without brackets", "compare", "runs=runs/a,runs/b", says="runs=runs/a,runs/b has several values; a list takes brackets: 'runs=[runs/a,runs/b]'."),
    row("a sweep of nothing", "masks", _RUN, "density=0.5", "--multirun", says="nothing is swept: give several values to a setting, as in gradloc masks …"),
    row("a sweep that can't be listed", "masks", _RUN, "density=interval(0,1)", "-m", says="density=interval(0,1) can't be listed; sweep with a,b or choice(a,b) or range(first,end,step)."),
    row("a sweep over the shell's patterns", "masks", "run=glob(runs/*)", "density=0.5", "-m", says="run=glob(runs/*) can't be listed; sweep with a,b …"),
    row("far too many jobs", "masks", _RUN, "density=range(0,1,0.0001)", "-m", says="the sweep has more than 1,000 jobs; give fewer values."),
    row("a sweep where one run makes sense only", "demo", "quick=true,false", "--multirun", says="demo runs one at a time; leave -m or --multirun out."),
    row("a sweep into a directory that isn't empty", "masks", _RUN, "density=0.3,0.5", "out=runs", "-m", says="out='runs' holds something already; name a new directory for the result."),
    # ---- types
    row("text for a number", "masks", _RUN, "density=much", says="density=much must be a number or null: share to keep. Example: …"),
    row("a list for a number", "masks", _RUN, "density=[1,2]", says="density=[1,2] must be a number or null: share to keep. Example: …"),
    row("a fraction for a whole number", "decompose", _RUN, "seed=1.5", says="seed=1.5 must be a whole number: of the search. Example: …"),
    row("a number for a switch", "report", _RUN, "wandb=3", says="wandb=3 must be true or false: log curves to W&B. Example: …"),
    row("text for a switch", "doctor", "json=maybe", says="json=maybe must be true or false: one JSON object is printed. Example: gradloc doctor path=runs"),
    row("a name for a list", "masks", _RUN, "include=ffn.*", says="include=ffn.* must be a list of names in brackets, such as [a,b] or null: …"),
    row("a mapping for a list", "decompose", _RUN, "include={a:b}", says="include={a:b} must be a list of names in brackets, such as [a,b] or null: …"),
    row("names in a list that need quotes", "compare", "runs=[my run (1),runs/b]", says="runs=[my run (1),runs/b] can't be read; put names with other characters than letters, digits and ._-/*? in quotes: \"runs=['a b',c]\"."),
    row("lists in a list", "compare", "runs=[[runs/a],[runs/b]]", says="runs=[[runs/a],[runs/b]] must be a list of names in brackets, such as [a,b]: two or more runs in brackets. Example: …"),
    row("an empty list", "masks", _RUN, "include=[]", says="include=[] must be a list of names in brackets, such as [a,b] or null: …"),
    row("null for a list", "compare", "runs=null", says="runs=null must be a list of names in brackets, such as [a,b]: …"),
    row("a list for a number of blocks", "decompose", _RUN, "blocks=[2]", says="blocks=[2] must be a single value: a number, or auto. Example: …"),
    row("an empty path", "report", "run=", says="run= is empty; give a value: the run's directory, as passed to wrap(run=…)."),
    row("an empty output", "masks", _RUN, "density=0.5", "out=", says="out= is empty; give a value: write the result to this file; …"),
    row("a NUL character", "masks", "run=a\0b", says="run= holds a NUL character; no name of a file or a setting does."),
    # ---- values
    row("a huge share", "masks", _RUN, "density=1e308", says="masks: density=1e+308 must be a number above 0 and at most 1."),
    row("a negative share", "masks", _RUN, "density=-1", says="masks: density=-1.0 must be a number above 0 and at most 1."),
    row("NaN for an error rate", "masks", _RUN, "alpha=nan", says="masks: alpha=nan must be between 0 and 1, both excluded."),
    row("an infinite error rate", "masks", _RUN, "alpha=inf", says="masks: alpha=inf must be between 0 and 1, both excluded."),
    row("a number beyond all weights", "masks", _RUN, "budget=10000000000000000000000", says="budget=10000000000000000000000 is more than the 2860 parameters that were chosen."),
    row("settings that exclude each other", "masks", _RUN, "alpha=0.05", "density=0.5", says="give one of alpha=, density= and budget=, not several."),
    row("a setting without effect", "masks", _RUN, "density=0.5", "correction=by", says="masks: correction= would have no effect with density=, budget= or n:m, which rank scores; they belong to alpha=. Leave them out."),
    row("an unknown criterion", "masks", _RUN, "density=0.5", "criterion=best", says="criterion='best' must be one of …"),
    row("n:m the wrong way round", "masks", _RUN, "granularity=4:2", says="granularity='4:2' keeps n of every m consecutive inputs; it needs 0 < n < m."),
    row("a name that matches nothing", "masks", _RUN, "density=0.5", "include=[blocks.*]", says="include: 'blocks.*' matches no recorded parameter; there are: tokens.weight, …"),
    row("a mistyped criterion", "masks", _RUN, "density=0.5", "criterion=saliancy", says="criterion='saliancy' must be one of … (did you mean saliency?)."),
    row("an unknown preset", "masks", _RUN, "preset=best", says="preset=best must be one of half, 2:4, units, tested, revert."),
    row("a mistyped kind of plan", "decompose", _RUN, "kind=structual", says="kind='structual' must be one of structural, conditional (did you mean structural?)."),
    row("an unknown kind of plan", "decompose", _RUN, "kind=both", says="kind='both' must be one of structural, conditional."),
    row("a billion blocks", "decompose", _RUN, "blocks=1000000000", "operators=[chain]", says="blocks=1000000000 must be between 2 and 20, the units of the smallest layer."),
    row("more blocks than hidden units", "decompose", _RUN, "kind=conditional", "blocks=1000000000", says="blocks=1000000000 is more than the hidden units of ffn."),
    row("a block and a half", "decompose", _RUN, "blocks=1.5", says="blocks=1.5 must be a whole number from 2, or 'auto'."),
    row("a negative seed", "decompose", _RUN, "seed=-1", says="seed=-1 must be a whole number from 0."),
    row("NaN for a share", "decompose", _RUN, "kind=conditional", "keep=nan", says="conditional blocks: keep=nan must be between 0 and 1, both excluded."),
    row("an unknown kind of operator", "decompose", _RUN, "operators=[lstm]", says="operators=['lstm'] must be of chain, …"),
    row("no target", "search", _RUN, "model=user:net", says="give one target: keep= (share of weights) or latency= (share of dense's time)."),
    row("a number where a list goes", "search", _RUN, "model=user:net", "keep=0.5", "blocks=4", says="blocks=4 must be a list of whole numbers in brackets, such as [2,4] or null: numbers of blocks to try, such as [2,4,8]. Example: …"),
    row("a name in a list of numbers", "search", _RUN, "model=user:net", "keep=0.5", "blocks=[many]", says="blocks=[many] must be a list of whole numbers in brackets, such as [2,4] or null: …"),
    row("several numbers of tokens without brackets", "search", _RUN, "model=user:net", "keep=0.5", "tokens=1,16", says="tokens=1,16 has several values; a list takes brackets: 'tokens=[1,16]'."),
    row("no tokens", "search", _RUN, "model=user:net", "keep=0.5", "tokens=[0]", says="tokens=[0] must be one or more whole numbers from 1 to 1,048,576."),
    row("an unknown form of blocks", "search", _RUN, "model=user:net", "keep=0.5", "forms=[round]", says="forms=['round'] must be a list of mixed, disjoint, overlapping."),
    row("a latency that nothing reaches", "search", _RUN, "model=user:net", "latency=0.000001", "blocks=[2]", "shuffles=1", "include=[ffn]", says="no operator has a candidate that meets the target: ffn: no candidate runs in 1e-06 of dense's time; …, the fastest, takes …"),
    row("another model than the run's", "search", _RUN, "model=user:build", "keep=0.5", says="model= returns another model than the run's: conv.bias is missing, in the run of shape (20,); …"),
    row("no model to measure", "search", _RUN, "model=user:text", "keep=0.5", says="model= returned a str; it must return the torch.nn.Module that was recorded."),
    row("a step of no time", "record-plan", "model=user:build", "step_seconds=0", says="step_seconds=0.0 must be a number of seconds above 0."),
    row("NaN for a time", "record-plan", "model=user:build", "step_seconds=nan", says="step_seconds=nan must be a number of seconds above 0."),
    row("several wrong settings of recording", "record-plan", "model=user:build", "every=0", "overhead=5", says="recording: every=0 must be a whole number from 1, or None; overhead=5.0 must be a share between 0 and 1."),
    row("a window that never ends", "record-plan", "model=user:build", "flush_every=1000000000000000000000", says="recording: flush_every=1000000000000000000000 must be a whole number from 1 to 1,000,000,000."),
    row("no steps", "anneal", "stage=user:stage", "masks=m.safetensors", "steps=0", says="steps=0 must be a whole number from 1."),
    row("negative patience", "anneal", "stage=user:stage", "masks=m.safetensors", "patience=-1", says="patience=-1 must be a whole number from 0."),
    row("NaN for a budget", "anneal", "stage=user:stage", "masks=m.safetensors", "budget=nan", says="budget=nan must be 0 or more: the allowed relative increase of the loss."),
    row("an unknown schedule", "anneal", "stage=user:stage", "masks=m.safetensors", "schedule=steep", says="schedule='steep' must be one of …"),
    row("a negative weight of distillation", "anneal", "stage=user:stage", "masks=m.safetensors", "distill=-1", says="distill=-1.0 must be 0 or more, and temperature=2.0 above 0."),
    row("another shell", "completion", "tcsh", says="shell='tcsh' must be one of bash, zsh, fish."),
    # ---- paths that are read
    row("no run there", "report", "run=runs/c", says="no run at 'runs/c': it has no run.json. Give the path that was passed to wrap(run=…)."),
    row("an empty directory", "analyze", "run=empty", says="no run at 'empty': it has no run.json. Give the path …"),
    row("a file for a run", "decompose", "run=notes.txt", says="no run at 'notes.txt': it has no run.json. Give the path …"),
    row("a link to itself", "report", "run=loop", says="no run at 'loop': it has no run.json. Give the path …"),
    row("a name that is too long", "report", f"run={_LONG}", says="run='nnn…': can't be read (File name too long). Check the path, the address and the credentials."),
    row("a name that isn't text", "report", os.fsdecode(b"run=\xe4\xff"), says="no run at '\\udce4\\udcff': it has no run.json. Give the path …"),
    row("a name that would steer the terminal", "report", "run=\x1b[2J\u202e", says="no run at '\\x1b[2J\\u202e': it has no run.json. Give the path …"),
    row("HTML for a name", "report", "run=<script>alert(1)</script>", says="no run at '<script>alert(1)</script>': it has no run.json. Give the path …"),
    row("one of the runs isn't there", "compare", "runs=[runs/a,runs/c]", says="no run at 'runs/c': it has no run.json. Give the path …"),
    row("one run to compare", "compare", "runs=[runs/a]", says="runs: a comparison needs at least two; got 1."),
    row("a store of an unknown kind", "report", "run=ftp://127.0.0.1/a", says="run='ftp://127.0.0.1/a': not a location that can be opened (…). Give a directory, or s3://, gs:// or abfs://."),
    row("a store without a bucket", "report", "run=s3://", says="run='s3://': can't be read (…). Check the path, the address and the credentials."),
    row("a store that doesn't answer", "masks", "run=s3://bucket/a?endpoint_override=127.0.0.1:1&scheme=http", "density=0.5", says="run='s3://bucket/a': can't be read (…connect to server…). Check the path, the address and the credentials."),
    # ---- runs that aren't whole
    row("a run of a former version", "report", "run=old", says="old/run.json: schema version 3; this gradloc reads 4. Read it with the gradloc that wrote it."),
    row("a run of a later version", "analyze", "run=future", says="future/run.json: schema version 99; this gradloc reads 4. Read it with …"),
    row("HTML and control characters for a version", "report", "run=hostile", says="hostile/run.json: schema version <b>\\x1b[2J</b>; this gradloc reads 4. …"),
    row("a description cut off", "masks", "run=cut", "density=0.5", says="cut/run.json: not a run's description (JSONDecodeError: …). Restore it from a copy."),
    row("a description of another program", "masks", "run=foreign", "density=0.5", says="foreign/run.json: not a run's description (AttributeError: …). Restore it from a copy."),
    row("a description without bottom", "report", "run=deep", says="deep/run.json: not a run's description (RecursionError: …). Restore it from a copy."),
    row("a description that isn't text", "report", "run=binary", says="binary/run.json: not a run's description (UnicodeDecodeError: …). Restore it from a copy."),
    row("wrong types in a description", "decompose", "run=mistyped", says="mistyped/run.json: not a run's description (TypeError: config is a int, not a mapping). Restore …"),
    row("a billion processes in a description", "analyze", "run=crowded", says="crowded/run.json: not a run's description (ValueError: world_size=1000000000 must be a whole number from 1 to 1,048,576). Restore …"),
    row("a shard cut off", "masks", "run=truncated", "density=0.5", says="truncated/shards/rank-00000/cells-000000.parquet: not a whole shard (…). Restore it from a copy, or read the run without it: skip_damaged=True."),
    row("an empty shard", "report", "run=hollow", says="hollow/shards/rank-00000/windows-000000.parquet: not a whole shard (…). Restore it from a copy, …"),
    row("a Parquet file of another program", "analyze", "run=parquet", says="parquet/shards/rank-00000/windows-000000.parquet: not a whole shard (its footer has no b'gradloc': not of gradloc, or of another version). Restore …"),
    row("another run's shards", "report", "run=mixed", says="mixed/shards/rank-00000/windows-000000.parquet: belongs to run …, not another. Move it out, or pass skip_damaged=True."),
    row("no shards", "decompose", "run=fresh", says="fresh: recording was closed without a finished window. Usual reasons are …"),
    row("a pickle for weights", "masks", "run=pickled", "density=0.5", says="pickled/snapshots/last.rank-00000.safetensors: not a whole snapshot (…). Restore it from a copy."),
    row("no weights", "verify", "plan=p.safetensors", "run=bare", says="bare: has no 'last' snapshot. Record with snapshots=True and call gradloc.report() or close the recorder."),
    # ---- files that aren't what they are said to be
    row("no masks there", "report", _RUN, "masks=nowhere.safetensors", says="'nowhere.safetensors': not a readable masks file (there is no such file)."),
    row("a directory for masks", "report", _RUN, "masks=empty", says="'empty': not a readable masks file (it is a directory)."),
    row("a model for masks", "report", _RUN, "masks=model.safetensors", says="model.safetensors: expected a gradloc masks file, found a foreign safetensors file."),
    row("a plan for masks", "anneal", "stage=user:stage", "masks=p.safetensors", says="p.safetensors: expected a gradloc masks file, found plan."),
    row("masks for a plan", "verify", "plan=m.safetensors", _RUN, says="m.safetensors: expected a gradloc plan file, found masks."),
    row("a pickle for a plan", "verify", "plan=pickle.safetensors", _RUN, says="pickle.safetensors: not a readable plan file (…)."),
    row("a plan with a hollow description", "verify", "plan=hollow.safetensors", _RUN, says="hollow.safetensors: not a whole plan file (KeyError: 'chains'). Make it anew."),
    row("a plan that was altered", "report", _RUN, "plan=altered.safetensors", says="altered.safetensors: its bytes aren't those that were written. Take it from a copy, or make it anew."),
    row("a plan of another model", "verify", "plan=p.safetensors", "weights=model.safetensors", says="the plan belongs to other weights: ffn.up.weight: the plan needs (36, 20), given nothing; …"),
    row("a plan to anneal of another model", "anneal", "stage=user:stage", "plan=p.safetensors", says="the plan belongs to another model: ffn.up.weight: the plan has shape (36, 20), the model no such parameter; …"),
    row("masks of another model", "anneal", "stage=user:stage", "masks=m.safetensors", says="the mask belongs to another model: conv.weight: the mask has shape (20, 20, 3), the model no such parameter; …"),
    row("a pickle for weights of a model", "verify", "plan=p.safetensors", "weights=pickle.safetensors", says="weights='pickle.safetensors': not a readable safetensors file (…); name one of the model."),
    row("a directory for weights", "verify", "plan=p.safetensors", "weights=empty", says="weights='empty': a directory; name a safetensors file."),
    row("two sources of weights", "verify", "plan=p.safetensors", _RUN, "weights=model.safetensors", says="verify needs one of run= and weights=: where the weights are that the plan is for."),
    row("a plan without routers", "verify", "plan=c.safetensors", _RUN, says="chain 'ffn': the plan has no router. Anneal it first: …"),
    row("masks and a plan", "anneal", "stage=user:stage", "masks=m.safetensors", "plan=p.safetensors", says="anneal needs one of masks= and plan=: …"),
    # ---- outputs
    row("a directory for an output", "masks", _RUN, "density=0.5", "out=empty", says="out='empty' is a directory; name a file in it."),
    row("an output over the run's own file", "masks", _RUN, "density=0.5", "out=runs/a/run.json", says="out='runs/a/run.json' is there already; name another file, or add overwrite=true to replace it."),
    row("an output over a script", "decompose", _RUN, "out=user.py", says="out='user.py' is there already; name another file, …"),
    row("a table over notes", "analyze", _RUN, "out=notes.csv", says="out='notes.csv' is there already; name another file, …"),
    row("a page over a file", "report", _RUN, "html=notes.txt", says="html='notes.txt' is there already; name another file, …"),
    row("a page below a file", "compare", "runs=[runs/a,runs/b]", "html=notes.txt/page.html", says="html='notes.txt/page.html' can't be written: notes.txt is not a directory; name one in a directory that you may write."),
    row("an output through a link to itself", "masks", _RUN, "density=0.5", "out=loop/m.safetensors", says="out='loop/m.safetensors' can't be written (Too many levels of symbolic links); name another file."),
    row("an output whose name is too long", "masks", _RUN, "density=0.5", f"out={_LONG}", says="out='nnn…' can't be written (File name too long); name another file."),
    row("an output in a store", "masks", _RUN, "density=0.5", "out=s3://bucket/m.safetensors", says="out='s3://bucket/m.safetensors': results go to local files; name one, and copy it to where it belongs."),
    row("a table of an unknown format", "analyze", _RUN, "out=curves.xlsx", says="out='curves.xlsx' must end in .csv or .parquet."),
    row("differences in an unknown format", "compare", "runs=[runs/a,runs/b]", "out=differences.txt", says="out='differences.txt' must end in .csv."),
    row("a file for a directory of tables", "report", _RUN, "csv=notes.txt", says="csv='notes.txt' is a file; name a directory."),
    row("a file for a directory of curves", "report", _RUN, "tensorboard=notes.txt", says="tensorboard='notes.txt' is a file; name a directory."),
    row("a result over another", "anneal", "stage=user:stage", "masks=m.safetensors", "out=runs", says="out='runs' holds something already; name a new directory for the result."),
    row("nothing to resume in a directory", "anneal", "stage=user:stage", "masks=m.safetensors", "out=runs", "resume=true", says="out='runs' holds something, but no interrupted stage; name the directory of one, or a new one."),
    row("a result over an interrupted stage", "anneal", "stage=user:stage", "masks=m.safetensors", "out=interrupted", says="out='interrupted' holds an interrupted stage; add resume=true to go on with it, or name a new directory for the result."),
    row("another stage than was interrupted", "anneal", "stage=user:stage", "masks=m.safetensors", "out=interrupted", "resume=true", says="out='interrupted' holds another stage: steps: 500 there, 1000 here; plan: with digest 0 there, none here; schedule: none there, \"cubic\" here; … parameter bias: none there, float32 of shape (8,) here. Go on with what that one began with, or name a new directory."),
    row("a result below a file", "anneal", "stage=user:stage", "masks=m.safetensors", "out=notes.txt/o", says="out='notes.txt/o' can't be written: notes.txt is not a directory; …"),
    row("a result where no directory can be made", "anneal", "stage=user:raises", "masks=m.safetensors", "out=/proc/o", says="out='/proc/o' can't be written: …/proc …; name one in a directory that you may write."),
    row("a table where no file can be made", "analyze", _RUN, "out=/proc/o.csv", says="out='/proc/o.csv' can't be written: …/proc …; name one in a directory that you may write."),
    row("a run below a file", "demo", "run=notes.txt/r", "quick=true", says="run='notes.txt/r' can't be written: notes.txt is not a directory; …"),
    row("nowhere to look", "doctor", "path=", says="path= is empty; give a value: where runs would be written: …"),
    # ---- code by name
    row("a module without a function", "record-plan", "model=user", says="model='user' is not of the form module:function. Give module:function, where the function takes nothing and returns the model."),
    row("a file for a module", "record-plan", "model=./user.py:build", says="model='./user.py:build' is not of the form module:function. …"),
    row("a module that there isn't", "anneal", "stage=nowhere:stage", "masks=m.safetensors", says="stage='nowhere:stage': no module 'nowhere' here or among what is installed. …"),
    row("a function that there isn't", "record-plan", "model=user:make", says="model='user:make': user has no 'make'. …"),
    row("something that isn't a function", "record-plan", "model=user:NUMBER", says="model='user:NUMBER' is a int, not a function. …"),
    row("a function that needs arguments", "record-plan", "model=user:needs", says="model='user:needs': calling it raised TypeError: …"),
    row("a function that raises", "record-plan", "model=user:raises", says="model='user:raises': calling it raised RuntimeError: boom (…user.py, line 11). Mend it, and try again."),
    row("a function that leaves Python", "record-plan", "model=user:leaves", says="model='user:leaves': calling it raised SystemExit: 0 (…user.py, line 15). …"),
    row("a module that doesn't parse", "record-plan", "model=broken:build", says="model='broken:build': importing it raised SyntaxError: … (broken.py, line 1). Mend it, and try again."),
    row("a module that imports what isn't there", "record-plan", "model=needy:build", says="model='needy:build': importing it raised ModuleNotFoundError: No module named 'not_there' (…needy.py, line 1). …"),
    row("a function that returns no model", "record-plan", "model=user:text", says="model is a str; pass the torch.nn.Module that you will train."),
    row("a model without anything to train", "record-plan", "model=user:frozen", says="the model has no parameter that requires a gradient, so there is nothing to record."),
    row("a stage that returns something else", "anneal", "stage=user:build", "masks=m.safetensors", says="stage: the function returned a Linear; it must return (model, optimizer, train_step, validate)."),
    row("a step that nobody can call", "anneal", "stage=user:batches", "masks=m.safetensors", says="stage: of (model, optimizer, train_step, validate), train_step asks for batch; it takes nothing, or annealer."),
    row("distillation that no loss can have", "anneal", "stage=user:stage", "masks=m.safetensors", "distill=1", says="distill=1.0 needs a train_step(annealer) that adds annealer.distillation(logits, inputs) to its loss; yours doesn't take annealer."),
]  # fmt: skip

USER = """import torch
NUMBER = 3
def build():
    return torch.nn.Linear(8, 8)
def net():
    from tests.conftest import Net
    return Net()
def needs(size):
    return torch.nn.Linear(size, size)
def raises():
    raise RuntimeError("boom")
def text():
    return "a model"
def leaves():
    raise SystemExit(0)
def frozen():
    return torch.nn.Linear(2, 2).requires_grad_(False)
def stage():
    model = build()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), (lambda: None), None
def batches():
    return *stage()[:2], (lambda batch: None), None
"""


def _edited(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((place / "run.json").read_text())
    change(data)
    (place / "run.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, masks, plans, a module of the user's, and one of everything that isn't what it should be."""
    here = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    for seed, name in ((0, "a"), (1, "b")):
        model, optimizer = make_net(seed)
        gradloc.wrap(
            optimizer, model, run=here / "runs" / name, every=1, flush_every=10, firing_every=1, firing_tokens=16
        )
        train(model, optimizer, 20)
        gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(here / "runs" / "a")
    gradloc.find_masks(run, density=0.5).save(here / "m.safetensors")
    plan = gradloc.plan_blocks(None, run, blocks=2, operators=["chain"])
    plan.save(here / "p.safetensors")
    gradloc.plan_blocks(None, run, kind="conditional", blocks=6, keep=0.34).save(here / "c.safetensors")
    save_file({"w": np.ones((2, 2), np.float32)}, here / "model.safetensors")
    save_file({"w": np.ones(1)}, here / "hollow.safetensors", metadata={"gradloc": '{"kind": "plan", "version": 1}'})
    other = {"stage": {"steps": "500", "plan": "with digest 0"}}
    save_state(here / "interrupted" / "state.safetensors", "annealing stage", other)
    content = (here / "p.safetensors").read_bytes()
    (here / "altered.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (here / "pickle.safetensors").write_bytes(pickle.dumps(_Explosive()))
    (here / "empty").mkdir()
    (here / "loop").symlink_to("loop")
    (here / "notes.txt").write_text("keep me")
    (here / "notes.csv").write_text("keep,me\n")
    (here / "user.py").write_text(USER)
    (here / "broken.py").write_text("def build(:\n")
    (here / "needy.py").write_text("import not_there\n")
    places = {
        name: here / name
        for name in ("old", "future", "hostile", "cut", "foreign", "deep", "binary", "mistyped", "crowded", "truncated", "hollow", "parquet", "mixed", "fresh", "pickled", "bare")
    }  # fmt: skip
    for place in places.values():
        shutil.copytree(here / "runs" / "a", place)
    _edited(places["old"], lambda data: data.update(schema_version=3))
    _edited(places["future"], lambda data: data.update(schema_version=99))
    _edited(places["hostile"], lambda data: data.update(schema_version="<b>\x1b[2J</b>"))
    _edited(places["mistyped"], lambda data: data.update(config=5))
    _edited(places["crowded"], lambda data: data.update(world_size=10**9))
    _edited(places["mixed"], lambda data: data.update(run_id="another"))
    (places["cut"] / "run.json").write_bytes((places["cut"] / "run.json").read_bytes()[:100])
    (places["foreign"] / "run.json").write_text('["a list of another program"]')
    (places["deep"] / "run.json").write_text("[" * 200_000)
    (places["binary"] / "run.json").write_bytes(b"\xff\xfe\x00")
    shard = Path("shards", "rank-00000")
    cells = places["truncated"] / shard / "cells-000000.parquet"
    cells.write_bytes(cells.read_bytes()[:100])
    (places["hollow"] / shard / "windows-000000.parquet").write_bytes(b"")
    pd.DataFrame({"a": [1]}).to_parquet(places["parquet"] / shard / "windows-000000.parquet")
    shutil.rmtree(places["fresh"] / "shards")
    (places["pickled"] / "snapshots" / "last.rank-00000.safetensors").write_bytes(pickle.dumps(_Explosive()))
    shutil.rmtree(places["bare"] / "snapshots")
    return here


class _Explosive:
    """Were it unpickled, a file would appear."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def contents(folder: Path) -> dict[str, str]:
    """Every file and directory, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else str(path.is_symlink())
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def untouched(world: Path) -> dict[str, str]:
    """What `world` holds before anything is typed."""
    return contents(world)


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("user", "broken", "needy"):
        sys.modules.pop(name, None)
    return world


# With json=true the line is the same; a store that doesn't answer is waited for once.
CASES = [(row, ()) for row in ROWS]
CASES += [(row, ("json=true",)) for row in ROWS if not re.search("json=|endpoint_override", row.typed)]


@pytest.mark.parametrize(
    ("row", "more"), CASES, ids=[f"{row.words[0]}: {row.wrong}{', as JSON' * bool(more)}" for row, more in CASES]
)
def test_one_line_says_what_to_do_and_nothing_is_lost(
    row: Row, more: tuple[str, ...], here: Path, untouched: dict[str, str], capsys: Any
) -> None:
    code = main([*row.words, *more])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("gradloc: ")
    assert said.err.endswith("\n")
    line = said.err.removeprefix("gradloc: ").removesuffix("\n")
    assert line.isprintable()
    assert len(line) <= 1300
    assert re.fullmatch(pattern(row.says), line), line
    assert contents(here) == untouched


def pattern(says: str) -> str:
    # A … that is meant as such stands in the messages, too.
    return ".*".join(re.escape(piece) for piece in says.split("…"))


def test_the_table_has_every_command_and_enough_rows() -> None:
    assert len(ROWS) >= 45
    assert {row.words[0] for row in ROWS} >= set(COMMANDS)
    assert len({row.words for row in ROWS}) == len(ROWS)
    assert len({row.wrong for row in ROWS}) == len(ROWS)


def table() -> str:
    """The rows as Markdown."""

    def cell(text: str) -> str:
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return "`` " + shown.replace(_LONG, "nnn…").replace("|", "\\|") + " ``"

    lines = ["| what is wrong | typed after `gradloc` | what is said |", "|---|---|---|"]
    lines += [f"| {row.wrong} | {cell(row.typed)} | {cell(row.says)} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def test_the_page_is_of_these_rows() -> None:
    assert PAGE.read_text().endswith("\n\n" + table()), "write it anew: python -m tests.cli.test_wrong_inputs"


if __name__ == "__main__":
    head, _, _ = PAGE.read_text().partition("| what is wrong |")
    PAGE.write_text(head + table())
