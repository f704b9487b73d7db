"""Pairs of prompt and response: make, clean, deduplicate, split, count, and stream them into training.

    python data.py demo  --out demo                                     questions and answers from tables of facts
    python data.py clean --source alpaca raw.json --out clean.parquet   a public dump becomes clean pairs
    python data.py dedup clean.parquet --out unique.parquet             near-duplicates go, the first of each stays
    python data.py split unique.parquet --out pairs                     train.parquet and valid.parquet
    python data.py stats pairs/train.parquet --tokenizer tok

MinHash: Broder 1997, "On the resemblance and containment of documents"; by one permutation, densified: Shrivastava
2017 (arXiv:1703.04664). torch is imported where batches are made and not before, so that the background processes
that clean and tokenise stay small.
"""
import contextlib
import copy
import csv
import functools
import hashlib
import html
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from tokenizer import (EOS, PAD, ArgumentParser, Problems, Tokenizer, atomic_write, batches, check_folder, in_order, input_files, joined_ranges, kind_of, number,
                       open_text, peek, read_rows, run, to_codepoints, whole_rows, write_errors)

ROW_GROUP = 8192  # rows of a Parquet row group that we write
WINDOW_ROWS, WINDOW_BYTES = 1 << 16, 1 << 25  # PairStream shuffles and sorts within windows of at most so much text
CLEAN_ROWS = 2048  # rows that a worker cleans at a time
SLICE_ROWS = 1024  # rows that are read and tokenised at a time
MOST_CHARS_PER_TOKEN = 16  # what of a text lies beyond max_len times this is not tokenised
IGNORED = -100  # the label of padding
PAIR, PREFERENCE = ("prompt", "response"), ("prompt", "chosen", "rejected")
EQUAL, NEAR = "equal to an earlier one", "near-duplicate of an earlier one"

pa.set_memory_pool(pa.system_memory_pool())  # slower than Arrow's own and gives back what is freed

# --- demo: a small world of facts, each asked in many ways ----------------------------------------------------------------

CAPITALS = """中国:北京 日本:东京 韩国:首尔 朝鲜:平壤 蒙古:乌兰巴托 越南:河内 老挝:万象 柬埔寨:金边 泰国:曼谷 缅甸:内比都 菲律宾:马尼拉 印度:新德里
尼泊尔:加德满都 不丹:廷布 巴基斯坦:伊斯兰堡 阿富汗:喀布尔 伊朗:德黑兰 伊拉克:巴格达 叙利亚:大马士革 约旦:安曼 黎巴嫩:贝鲁特 也门:萨那 阿曼:马斯喀特
卡塔尔:多哈 土耳其:安卡拉 格鲁吉亚:第比利斯 亚美尼亚:埃里温 阿塞拜疆:巴库 塔吉克斯坦:杜尚别 法国:巴黎 英国:伦敦 德国:柏林 意大利:罗马 西班牙:马德里
葡萄牙:里斯本 荷兰:阿姆斯特丹 比利时:布鲁塞尔 奥地利:维也纳 瑞士:伯尔尼 丹麦:哥本哈根 挪威:奥斯陆 芬兰:赫尔辛基 瑞典:斯德哥尔摩 冰岛:雷克雅未克
爱尔兰:都柏林 波兰:华沙 捷克:布拉格 匈牙利:布达佩斯 罗马尼亚:布加勒斯特 保加利亚:索非亚 希腊:雅典 俄罗斯:莫斯科 乌克兰:基辅 白俄罗斯:明斯克
爱沙尼亚:塔林 拉脱维亚:里加 立陶宛:维尔纽斯 塞尔维亚:贝尔格莱德 克罗地亚:萨格勒布 美国:华盛顿 加拿大:渥太华 墨西哥:墨西哥城 古巴:哈瓦那 牙买加:金斯敦
海地:太子港 巴西:巴西利亚 秘鲁:利马 智利:圣地亚哥 阿根廷:布宜诺斯艾利斯 乌拉圭:蒙得维的亚 巴拉圭:亚松森 哥伦比亚:波哥大 委内瑞拉:加拉加斯
厄瓜多尔:基多 埃及:开罗 利比亚:的黎波里 摩洛哥:拉巴特 苏丹:喀土穆 肯尼亚:内罗毕 乌干达:坎帕拉 卢旺达:基加利 索马里:摩加迪沙 尼日利亚:阿布贾
加纳:阿克拉 塞内加尔:达喀尔 马里:巴马科 安哥拉:罗安达 赞比亚:卢萨卡 津巴布韦:哈拉雷 纳米比亚:温得和克 莫桑比克:马普托 澳大利亚:堪培拉 新西兰:惠灵顿"""
PROVINCES = """河北:冀:石家庄 山西:晋:太原 辽宁:辽:沈阳 吉林:吉:长春 黑龙江:黑:哈尔滨 江苏:苏:南京 浙江:浙:杭州 安徽:皖:合肥 福建:闽:福州 江西:赣:南昌
山东:鲁:济南 河南:豫:郑州 湖北:鄂:武汉 湖南:湘:长沙 广东:粤:广州 海南:琼:海口 四川:川:成都 贵州:黔:贵阳 云南:滇:昆明 陕西:陕:西安 甘肃:甘:兰州 青海:青:西宁"""
ANTONYMS = """大:小 多:少 高:低 长:短 快:慢 冷:热 黑:白 远:近 轻:重 新:旧 早:晚 真:假 好:坏 美:丑 胖:瘦 粗:细 深:浅 软:硬 强:弱 明:暗 左:右 前:后 上:下
里:外 东:西 南:北 天:地 开:关 进:出 来:去 生:死 买:卖 哭:笑 爱:恨 胜:负 得:失 输:赢 升:降 起:落 古:今 文:武 公:私 正:反 阴:阳 干:湿 甜:苦 饥:饱 贫:富
善:恶 勤:懒 松:紧 宽:窄 厚:薄 浓:淡 动:静 加:减 借:还 问:答 攻:守 安全:危险 成功:失败 光明:黑暗 温暖:寒冷 美丽:丑陋 聪明:愚笨 勇敢:胆怯 诚实:虚伪
谦虚:骄傲 勤劳:懒惰 快乐:悲伤 高兴:难过 简单:复杂 增加:减少 上升:下降 前进:后退 开始:结束 出现:消失 记住:忘记 喜欢:讨厌 表扬:批评 团结:分裂
和平:战争 进步:退步 积极:消极 主动:被动 主观:客观 先进:落后 富裕:贫穷 繁荣:萧条 热情:冷淡 安静:吵闹 整齐:杂乱 干净:肮脏 清楚:模糊 仔细:粗心 节约:浪费
延长:缩短 扩大:缩小 坚强:软弱 紧张:放松 公开:秘密 普通:特殊 朋友:敌人 优点:缺点 城市:农村 过去:未来 白天:黑夜 晴天:雨天 顺利:曲折 精致:粗糙
慷慨:吝啬 熟悉:陌生 永远:暂时 希望:失望 拥挤:宽敞 平坦:崎岖 鲜艳:暗淡"""
MEASURES = """本:书,词典,杂志,小说 只:鸟,猫,鸡,羊,兔子,蚂蚁 条:鱼,河,裙子,毛巾,蛇 匹:马,布 头:牛,猪,大象 张:纸,桌子,床,照片,地图 把:椅子,刀,伞,钥匙,扇子
支:笔,香烟,箭 辆:汽车,自行车,卡车 架:飞机,钢琴 艘:船,军舰 座:山,桥,城市,塔 棵:树,白菜,草 朵:花,云 件:衣服,礼物,事情 双:鞋,筷子,袜子,手套
杯:水,茶,咖啡,牛奶 碗:饭,汤,面条 首:歌,诗 台:电脑,电视,洗衣机 面:镜子,红旗,墙 颗:星星,牙齿,糖,珍珠 粒:米,沙子,种子 顶:帽子,轿子 盏:灯 封:信 幅:画
扇:门,窗户 口:井,锅 块:石头,手表,蛋糕 片:树叶,面包 位:老师,医生,客人 名:学生,警察,士兵 间:房间,教室 家:医院,商店,公司 所:学校,大学 部:电影,手机"""
UNITS = """千米:米:1000 米:厘米:100 米:分米:10 分米:厘米:10 厘米:毫米:10 千克:克:1000 吨:千克:1000 斤:两:10 千克:斤:2 小时:分钟:60 分钟:秒:60 天:小时:24
星期:天:7 元:角:10 角:分:10 升:毫升:1000 平方米:平方分米:100 世纪:年:100 年:个月:12"""
MONTH_DAYS = {month: 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31 for month in range(1, 13)}
CYCLES = {"星期": "一二三四五六日", "生肖": "鼠牛虎兔龙蛇马羊猴鸡狗猪", "季节": "春夏秋冬"}
CHAT = """你好|您好|你好呀|嗨|哈喽|早上好|很高兴认识你=你好！我是ChatLM，很高兴和你聊天。
你是谁|你叫什么名字|介绍一下你自己|你是什么|你能介绍一下自己吗|怎么称呼你|说说你是谁=我是ChatLM，一个从零开始训练的中文小模型。
谢谢|谢谢你|非常感谢|多谢了|太感谢你了|谢谢你的帮助|感谢你的回答=不客气，很高兴能帮到你。
再见|拜拜|下次再聊|我先走了|回头见|今天就到这里吧|我要走了=再见，欢迎下次再来！
你会做什么|你能做什么|你有什么本领|你可以帮我做什么|你会些什么|我可以问你什么|你懂什么=我会说首都、省会、反义词、量词和单位换算，也会做简单的加减法。
你有多大|你有多少参数|你是大模型吗|你的规模有多大|你有几个参数|你是小模型吗|你大不大=我很小，参数只有一百多万个。
晚安|祝你晚安|睡个好觉|该睡了，晚安|夜深了，晚安|道一声晚安|我睡了，晚安=晚安，祝你做个好梦！"""
OPENINGS = ["", "请问，", "你好，", "我想知道，", "请告诉我，", "问你一下，"]
DIGITS = "零一二三四五六七八九"


def in_words(n: int) -> str:
    """0 to 99: 7 -> 七, 10 -> 十, 23 -> 二十三."""
    tens, ones = divmod(n, 10)
    return (DIGITS[tens] if tens > 1 else "") + ("十" if tens else "") + (DIGITS[ones] if ones or not tens else "")


def demo_facts() -> Iterator[tuple[list[str], str]]:
    """Every fact of the demo: the wordings of its question, and its one answer."""
    for country, city in (entry.split(":") for entry in CAPITALS.split()):
        yield [f"{country}的首都是哪里？", f"{country}的首都是哪座城市？", f"{country}首都在哪儿？", f"{country}的首都叫什么？",
               f"哪座城市是{country}的首都？", f"说出{country}的首都。", f"你知道{country}的首都吗？"], f"{country}的首都是{city}。"
    for name, short, city in (entry.split(":") for entry in PROVINCES.split()):
        yield [f"{name}省的省会是哪里？", f"{name}的省会是哪座城市？", f"{name}省会在哪儿？", f"哪座城市是{name}省的省会？",
               f"说出{name}省的省会。", f"你知道{name}的省会吗？", f"{name}省的省会叫什么？"], f"{name}省的省会是{city}。"
        yield [f"{name}省的简称是什么？", f"{name}的简称是哪个字？", f"{name}省简称什么？", f"用一个字称呼{name}省。",
               f"说出{name}省的简称。", f"你知道{name}的简称吗？", f"{name}省的简称叫什么？"], f"{name}省的简称是{short}。"
        yield [f"{city}是哪个省的省会？", f"{city}是哪里的省会？", f"哪个省的省会是{city}？", f"{city}属于哪个省？",
               f"{city}在哪个省？", f"说出{city}所在的省。", f"你知道{city}是哪个省的吗？"], f"{city}是{name}省的省会。"
    for pair in (entry.split(":") for entry in ANTONYMS.split()):
        for word, opposite in (pair, pair[::-1]):
            yield [f"{word}的反义词是什么？", f"“{word}”的反义词是什么？", f"{word}的反义词是哪个？", f"和{word}意思相反的词是什么？",
                   f"说出{word}的反义词。", f"你知道{word}的反义词吗？", f"与“{word}”相反的词是哪个？"], f"{word}的反义词是{opposite}。"
    for measure, nouns in (entry.split(":") for entry in MEASURES.split()):
        for noun in nouns.split(","):
            yield [f"{noun}的量词是什么？", f"“{noun}”用什么量词？", f"{noun}用哪个量词？", f"一什么{noun}？", f"说出{noun}的量词。",
                   f"你知道{noun}的量词吗？", f"{noun}前面用什么量词？"], f"一{measure}{noun}。"
    for big, small, factor in (entry.split(":") for entry in UNITS.split()):
        for n in range(1, 10):
            count = str(n) + ("个" if big in ("小时", "星期", "世纪") else "")
            yield [f"{count}{big}等于多少{small}？", f"{count}{big}是多少{small}？", f"{count}{big}有多少{small}？", f"把{count}{big}换算成{small}。",
                   f"多少{small}等于{count}{big}？", f"{count}{big}合多少{small}？", f"你知道{count}{big}是多少{small}吗？"], \
                f"{count}{big}等于{n * int(factor)}{small}。"
    for month, days in MONTH_DAYS.items():
        yield [f"{month}月有多少天？", f"{month}月份有几天？", f"{month}月一共多少天？", f"平年的{month}月有几天？", f"说出{month}月的天数。",
               f"你知道{month}月有多少天吗？", f"{month}月是多少天？"], f"{month}月有{days}天。"
    for kind, cycle in CYCLES.items():
        name = (lambda x: f"星期{x}") if kind == "星期" else (lambda x: f"{x}年") if kind == "生肖" else (lambda x: f"{x}天")
        for i, item in enumerate(cycle):
            for side, words, step in (("后面", "下一个", 1), ("前面", "上一个", -1)):
                this, other = name(item), name(cycle[(i + step) % len(cycle)])
                yield [f"{this}的{side}是什么？", f"{this}{side}是哪个？", f"{this}的{words}是什么？", f"{this}的{words}是哪个？",
                       f"说出{this}的{words}。", f"你知道{this}{side}是什么吗？", f"{this}的{side}一个是什么？"], f"{this}的{side}是{other}。"
    for line in CHAT.splitlines():
        wordings, answer = line.split("=")
        yield wordings.split("|"), answer


def demo_sums() -> Iterator[tuple[list[str], str]]:
    """Additions and subtractions, in digits up to 30 and in words up to 20."""
    for limit, say in ((30, str), (20, in_words)):
        for a in range(limit + 1):
            for b in range(limit + 1):
                yield [f"{say(a)}加{say(b)}等于多少？", f"{say(a)}加上{say(b)}是多少？"], f"{say(a)}加{say(b)}等于{say(a + b)}。"
                if b <= a:
                    yield [f"{say(a)}减{say(b)}等于多少？", f"{say(a)}减去{say(b)}是多少？"], f"{say(a)}减{say(b)}等于{say(a - b)}。"


def is_sum(prompt: str) -> bool:
    """Whether a demo question is one of demo_sums'."""
    return re.search("[加减].*(等于多少|是多少)？$", prompt) is not None


def make_demo(seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, response) pairs to train on and held out.

    Of every fact one wording is held out, asked about it nowhere in training though other facts are asked that way;
    of the sums one in twenty is held out in every wording.
    """
    rng = random.Random(seed)
    train, valid = [], []
    for i, (wordings, answer) in enumerate(demo_facts()):
        for j, wording in enumerate(wordings):
            openings = [o for o in OPENINGS if not wording.startswith(o.rstrip("，") or " ")]
            if j == i % len(wordings):
                valid.append((rng.choice(openings) + wording, answer))
            else:
                train += [(opening + wording, answer) for opening in rng.sample(openings, 3)]
    for wordings, answer in demo_sums():
        if rng.random() < 0.05:
            valid.append((rng.choice(wordings), answer))
        else:
            train += [(opening + wording, answer) for wording in wordings for opening in rng.sample(OPENINGS, 3)]
    rng.shuffle(train)
    return train, valid


# --- writing ----------------------------------------------------------------------------------------------------------------

class Writer:
    """Writes rows' string columns as Parquet by atomic_write: path is replaced at the end, unless there was an error. The file's
    metadata tells that this program wrote it: see check_outputs."""
    MARK = {"written_by": "ChatLM data.py"}

    def __init__(self, path, columns: tuple[str, ...]):
        self.path, self.columns, self.total, self.batch = Path(path), columns, 0, []
        check_parquet_path(self.path)
        check_folder(self.path.parent)

    def __enter__(self) -> "Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.schema = pa.schema([(c, pa.string()) for c in self.columns], self.MARK)
        self.exit = contextlib.ExitStack()
        temporary = self.exit.enter_context(atomic_write(self.path))
        with write_errors(self.path, pa.ArrowException):
            self.parquet = pq.ParquetWriter(temporary, self.schema, compression="zstd")
        self.exit.callback(self.close)
        return self

    def write(self, row: dict) -> None:
        self.batch.append(row)
        if len(self.batch) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        values = {c: [row[c] for row in self.batch] for c in self.columns}
        try:
            table = pa.table(values, self.schema)
        except UnicodeEncodeError:  # a lone surrogate, as JSON may hold, is no character
            table = pa.table({c: [v.encode("utf-8", "replace").decode() for v in column] for c, column in values.items()}, self.schema)
        with write_errors(self.path, pa.ArrowException):
            self.parquet.write_table(table)
        self.total += len(self.batch)
        self.batch = []

    def finish(self) -> None:
        """Write all that is left; the file is not yet in its place."""
        if self.batch:
            self.flush()
        with write_errors(self.path, pa.ArrowException):
            self.parquet.close()

    def close(self) -> None:
        """Close the temporary file, also after an error."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self.parquet.close()

    def __exit__(self, kind, error, trace) -> None:
        with self.exit:
            if error is not None:
                raise error
            self.finish()


def check_parquet_path(path: Path) -> None:
    """Raises ValueError for a path to which no Parquet file can be written."""
    if path.suffix != ".parquet" or path.exists() and not path.is_file():
        raise ValueError(f"{path}: the output is a file whose name ends with .parquet")


def check_outputs(inputs: list[str], outputs: list[Path]) -> None:
    """Raises ValueError for an output that is no Parquet file, or a file of an input folder that data.py did not write."""
    for output in outputs:
        check_parquet_path(output)
    folders = [Path(path).resolve() for path in inputs if Path(path).is_dir()]
    for output in outputs:
        if output.exists() and any(output.resolve().is_relative_to(folder) for folder in folders):
            try:
                ours = (pq.read_schema(output).metadata or {}).get(b"written_by") == Writer.MARK["written_by"].encode()
            except (pa.ArrowException, OSError):
                ours = False
            if not ours:
                raise ValueError(f"{output} is in the folder to read and would be overwritten: choose another --out")


def write_pairs(path, rows: Iterable[dict], columns: tuple[str, ...] = PAIR) -> int:
    """Write rows' string columns as Parquet; the number of rows."""
    with Writer(path, columns) as writer:
        for row in rows:
            writer.write(row)
    return writer.total


def write_demo(folder, seed: int = 0) -> dict[str, int]:
    """Write make_demo's pairs as train.parquet and valid.parquet; how many, by path."""
    paths = [str(Path(folder) / f"{name}.parquet") for name in ("train", "valid")]
    return {path: write_pairs(path, ({"prompt": p, "response": r} for p, r in pairs)) for path, pairs in zip(paths, make_demo(seed))}


def refuse_nothing(rows: int, inputs: list[str], problems: Problems) -> None:
    """Raises ValueError where nothing is left to write: what was there before stays."""
    if not rows:
        problems.warn()
        raise ValueError(f"{', '.join(map(str, inputs))}: no row can be used, and nothing was written")


def report(counts: Problems, problems: Problems) -> None:
    """A table of reasons and rows, and what was wrong in the files."""
    for reason, rows in [*counts.most_common(), ("all", counts.total())]:
        print(f"{rows:>12,}  {reason}" + (f"  (first: {counts.first[reason]})" if reason in counts.first else ""))
    problems.warn()


# --- clean: rules ---------------------------------------------------------------------------------------------------------------

CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TO_CHINESE = dict(zip(",;:!?", "，；：！？"))


def drop_controls(text: str) -> str:
    """Line ends become \\n; other control characters, zero-width marks and lone surrogates go."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    text = text.replace("\x0b", " ").replace("\x0c", " ")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ud800-\udfff]", "", text)


def squeeze_punctuation(text: str) -> str:
    """。。。。 -> 。 and ！！！ -> ！, while …… and —— stay pairs, and ... and ;; keep theirs where they stand in code."""
    text = re.sub(rf"([。！？，、；：])\1+|(?<=[{CHINESE}])([,;])\2+", r"\1\2", text)
    return re.sub(r"([…—])\1{2,}", r"\1\1", re.sub(r"([!?～])\1{2,}|(?<=[^\s~])(~)~{2,}|\.{4,}", lambda m: m[1] or m[2] or "...", text))


def squeeze_spaces(text: str) -> str:
    """Runs of spaces inside a line become one; indents and line breaks stay, of blank lines one."""
    text = re.sub(r"(?<=[^ \t\u3000\xa0\n])[ \t\u3000\xa0]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n \u3000")


def chinese_punctuation(text: str) -> str:
    """你好,世界. -> 你好，世界。 Only right after a Chinese character, and not before a digit or a letter."""
    text = re.sub(f"(?<=[{CHINESE}])[,;:!?](?=[{CHINESE}“‘《（\\s]|$)", lambda m: TO_CHINESE[m[0]], text)
    return re.sub(f"(?<=[{CHINESE}])\\.(?=[{CHINESE}“‘《（\\n]|$)", "。", text)


CODE = re.compile(r"[{}<>=$\\|`\t]|://|\w\(\)|^ {4}|^~~~", re.M)  # in a line of code, of a table, with an address
CUT_OFF = re.compile(rf"[。！？!?][”’」』）)】》]*([^。！？!?\n]*[{CHINESE}，、])$")
LIST_ITEM = re.compile(r"\s*([-*•·#]|[（(]?[\d一二三四五六七八九十]+[、.．)）])")


def trim_unfinished(text: str, min_chars: int = 200) -> str:
    """A long answer whose last line breaks off in mid-sentence ends at that line's last whole sentence. Other ends, of
    lists, code, numbers and what has no sentences, are ends as they are."""
    found = len(text) >= min_chars and CUT_OFF.search(text)
    if not found or LIST_ITEM.match(text, text.rfind("\n") + 1) or CODE.search(text, text.rfind("\n") + 1):
        return text
    return text[:found.start(1)]


def chinese_share(text: str) -> float:
    """Chinese characters among all letters and digits, 0 to 1; 1 for a text without any."""
    letters = sum(map(str.isalnum, text))
    return len(re.findall(f"[{CHINESE}]", text)) / letters if letters else 1.0


def clean_text(text: str) -> str:
    """All rules; lines that look like code, tables or addresses keep their punctuation and their spaces."""
    lines = [line.rstrip(" \t\u3000\xa0") for line in drop_controls(text).split("\n")]
    if not CODE.search(text := "\n".join(lines)):
        return chinese_punctuation(squeeze_spaces(squeeze_punctuation(text)))
    lines = [line if CODE.search(line) else chinese_punctuation(squeeze_punctuation(line)) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def clean_pair(prompt, response, min_chars: int, max_chars: int, verbatim: bool = False) -> tuple[str, str] | str:
    """The pair after all rules, or the reason why it is dropped. verbatim: the response is left as it is."""
    if not isinstance(prompt, str) or not isinstance(response, str):
        return "a field is missing or not text"
    if len(prompt) > 100 * max_chars or len(response) > 100 * max_chars:
        return f"over {max_chars} characters"
    prompt, response = clean_text(prompt), drop_controls(response) if verbatim else trim_unfinished(clean_text(response))
    if not prompt or not response:
        return "empty"
    if "\ufffd" in prompt + response:
        return "has characters that could not be read"
    if prompt == response:
        return "response repeats the prompt"
    if len(response) < min_chars:
        return f"response under {min_chars} characters"
    if len(prompt) > max_chars or len(response) > max_chars:
        return f"over {max_chars} characters"
    if chinese_share(prompt + response) < 0.3:
        return "mostly not Chinese"
    return prompt, response


# --- clean: sources. Each takes a raw row and gives (prompt, response), or the reason why the row is dropped ---------------------

def dice(a: str, b: str) -> float:
    """Similarity of two texts' sets of characters: 2 |A and B| / (|A| + |B|)."""
    return 2 * len(set(a) & set(b)) / max(1, len(set(a)) + len(set(b)))


def joined(first, second) -> str | None:
    """Title and description, instruction and input: both, unless one is empty or says the same."""
    if not isinstance(first, str) or not isinstance(second or "", str):
        return None
    return first if not second or dice(first, second) >= 0.9 else f"{first}\n{second}"


def webtext(row: dict):
    try:
        if int(float(row.get("star") or 0)) < 5:
            return "fewer than 5 stars"
    except (TypeError, ValueError, OverflowError):
        return "star is not a number"
    return row.get("title"), row.get("content")


def belle(row: dict):
    """instruction, input and output; or input and target; or conversations, of which those of one turn are taken."""
    if "conversations" in row:
        try:
            (ask, prompt), (reply, response) = ((turn["from"], turn["value"]) for turn in row["conversations"])
        except (TypeError, KeyError):
            return "conversations is not a list of from and value"
        except ValueError:
            return "conversation of several turns"
        if ask not in ("human", "user") or reply not in ("assistant", "gpt", "bot"):
            return "conversation of several turns" if reply in ("human", "user") else "conversation without a human or an assistant"
    elif "target" in row and "output" not in row:
        prompt, response = row.get("input"), row["target"]
    else:
        prompt, response = joined(row.get("instruction") or "", row.get("input")), row.get("output")
    if isinstance(prompt, str) and any(word in prompt for word in ("翻译", "译成", "译为", "表格")):
        return "translation or table"
    return prompt, response


def unescaped(text):
    """Line breaks for the two characters \\n, with which some published files write them, in a text without real ones. Before a
    letter they stay: \\neq and \\nu are LaTeX."""
    return re.sub(r"\\n(?![A-Za-z])", "\n", text) if isinstance(text, str) and "\n" not in text else text


def preference(row: dict):
    rejected = row.get("rejected", row.get("reject"))
    return tuple(unescaped(text) for text in (row.get("prompt"), row.get("chosen"), rejected))


def duie(row: dict):
    try:
        def value(x):
            return x["@value"] if isinstance(x, dict) else x
        triples = [f"({t['subject']},{t['predicate']},{value(t['object'])})" for t in row["spo_list"]]
    except (KeyError, TypeError):
        return "no spo_list of subject, predicate, object"
    if not isinstance(row.get("text"), str):
        return "a field is missing or not text"
    return f"请抽取出下面这句话中的所有三元组：{row['text']}", f"[{','.join(triples)}]" if triples else ""


WIKI_PROMPTS = """什么是%s？|介绍一下%s。|请介绍一下%s。|%s是什么？|请解释一下%s。|你知道%s吗？|说说%s。|告诉我%s是什么。|请简要介绍%s。|%s指的是什么？|我想了解%s。
如何理解%s？|能讲讲%s吗？|关于%s，你知道些什么？|%s是什么意思？|请说明%s的含义。|帮我查一下%s。|谈谈%s。|请问%s是什么？|给我讲讲%s。|词条：%s""".replace("\n", "|").split("|")


def wiki(row: dict):
    """An entry's name becomes a question, and its first sentences, up to 512 characters, the answer."""
    title, text = row.get("title"), row.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        return "a field is missing or not text"
    if not title.strip():
        return "entry without a title"
    first, _, rest = text.strip().partition("\n")
    text = rest.strip() if first.strip() == title else text.strip()  # the name stands above the text once more
    answer = ""
    for sentence in re.findall(r"[^。！？\n]*[。！？\n]?", text):
        if len(answer) + len(sentence) > 512:
            break
        answer += sentence
    return WIKI_PROMPTS[xxhash.xxh3_64_intdigest(title.encode("utf-8", "replace")) % len(WIKI_PROMPTS)] % title, answer


def wiki_entries(path: Path, problems: Problems) -> Iterator[dict]:
    """title and text of every entry, as one WikiExtractor or another wrote them: <doc ... title="..."> to </doc>, a line of JSON,
    or "title:", the text and a blank line."""
    if kind_of(path) != ".txt":
        yield from read_rows([path], problems)
        return
    with open_text(path, problems) as f:
        head = peek(f, 1 << 16)
        tagged = "<doc " in head or head.lstrip().startswith("{")
        yield from (tagged_entries if tagged else titled_entries)(f, path, problems)


def titled_entries(lines: Iterable[str], path: Path, problems: Problems) -> Iterator[dict]:
    """A title is a line that ends with a colon, at the beginning or after a blank line. Paragraphs after a blank line that are
    none go on with the entry."""
    title, text, after_blank = None, [], True
    for i, line in enumerate(lines, 1):
        stripped = line.strip()
        if after_blank and stripped.endswith((":", "：")):
            if title is not None:
                yield {"title": title, "text": "".join(text)}
            title, text = stripped[:-1], []
        elif title is not None:
            text.append(line)
        elif stripped:
            problems.note("line outside an entry", f"{path}, line {i:,}")
        after_blank = not stripped
    if title is not None:
        yield {"title": title, "text": "".join(text)}


def tagged_entries(lines: Iterable[str], path: Path, problems: Problems) -> Iterator[dict]:
    title, text = None, []
    for i, line in enumerate(lines, 1):
        if begins := re.match(r'<doc [^>]*title="(.*?)"[^"]*>$', line.rstrip()):
            if title is not None:
                problems.note("entry without an end", f"{path}, line {i:,}")
            title, text = html.unescape(begins[1]), []
        elif title is not None and line.rstrip() == "</doc>":
            yield {"title": title, "text": "".join(text)}
            title = None
        elif title is not None:
            text.append(line)
        elif line.startswith("{"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                problems.note("line is not JSON", f"{path}, line {i:,}")
        elif line.strip():
            problems.note("line outside an entry", f"{path}, line {i:,}")
    if title is not None:
        problems.note("entry without an end", f"{path}, line {i:,}")


def medical_rows(path: Path, problems: Problems) -> Iterator[dict]:
    """The rows of department,title,ask,answer. Many records of this set are broken over several lines, or have commas
    and quotes in a field that is not quoted: a line that does not begin as a record does goes on with the one before,
    and what is more than four fields belongs to the last."""
    def fields_of(text: str) -> list[str]:
        try:
            fields = next(csv.reader([text]), [])
        except csv.Error:
            fields = []
        return fields if len(fields) == 4 else text.split(",", 3)

    with open_text(path, problems) as f:
        record, began, departments = "", 1, set()
        for i, line in enumerate(chain(f, [None]), 1):
            head = (line or "").split(",", 3)
            begins = line is None or head[0] in departments or len(head) == 4 and 0 < len(head[0].strip()) <= 12 and record.count('"') % 2 == 0
            if not begins:
                record += line
                continue
            fields = fields_of(record.rstrip("\r\n").replace("\r\n", "\n"))
            if len(fields) == 4:
                if fields[0] != "department":
                    yield dict(zip(("department", "title", "ask", "answer"), fields))
            elif record.strip():
                problems.note("record with fewer than four fields", f"{path}, line {began:,}")
            record, began = line, i
            departments.update(head[:1] if len(head) == 4 else [])


SOURCES: dict[str, Callable] = {
    "webtext2019zh": webtext,
    "baike_qa2019": lambda row: (joined(row.get("title"), row.get("desc")), row.get("answer")),
    "chinese_medical": lambda row: (joined(row.get("title"), row.get("ask")), row.get("answer")),
    "zhihu_kol": lambda row: (row.get("INSTRUCTION"), row.get("RESPONSE")),
    "belle": belle,
    "wiki": wiki,
    "alpaca": lambda row: (joined(row.get("instruction"), row.get("input")), row.get("output")),
    "duie": duie,
    "preference": preference,
    "pairs": lambda row: None,  # fields named on the command line
}


def raw_rows(path: Path, source: str, problems: Problems) -> Iterator[dict]:
    if source == "wiki":
        return wiki_entries(path, problems)
    if source == "chinese_medical" and kind_of(path) == ".csv":
        with open_text(path, Problems()) as f:
            header = f.readline().strip().split(",")
        if header == ["department", "title", "ask", "answer"] or not {"title", "ask", "answer"} <= set(header):
            return medical_rows(path, problems)
    return read_rows([path], problems)


class CleanJob(NamedTuple):
    """One batch of raw rows for clean_rows."""
    path: Path
    first: int  # the number of its first row in the file
    rows: list[dict]
    source: str
    fields: list[str]  # of the source pairs
    min_chars: int
    max_chars: int
    to_simplified: bool


def clean_rows(job: CleanJob) -> tuple[list[dict], list[tuple[str, str]]]:
    """Clean rows, and for each of the others why and where it was dropped."""
    kept, dropped = [], []
    for i, row in enumerate(job.rows, job.first):
        row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}  # as pandas writes it
        taken = tuple(row.get(f) for f in job.fields) if job.source == "pairs" else SOURCES[job.source](row)
        others: tuple = ()
        if not isinstance(taken, str):
            taken = tuple(without_eos(text) for text in taken)
            if job.to_simplified:
                taken = tuple(simplified(text) for text in taken)
            shortest = 1 if job.source == "duie" else job.min_chars
            taken, others = clean_pair(*taken[:2], shortest, job.max_chars, job.source == "duie"), taken[2:]
        if isinstance(taken, str):
            dropped.append((taken, f"{job.path}, row {i:,}"))
        elif not others:
            kept.append({"prompt": taken[0], "response": taken[1]})
        elif isinstance(second := clean_pair(taken[0], others[0], shortest, job.max_chars), str):
            dropped.append(("rejected: " + second, f"{job.path}, row {i:,}"))
        elif second[1] == taken[1]:
            dropped.append(("chosen and rejected are equal", f"{job.path}, row {i:,}"))
        else:
            kept.append({"prompt": taken[0], "chosen": taken[1], "rejected": second[1]})
    return kept, dropped


def without_eos(text):
    """A text without the [EOS] that ChatLM-mini-Chinese asks people to write at its end: the tokenizer adds it."""
    return text.rstrip().removesuffix("[EOS]") if isinstance(text, str) and text.rstrip().endswith("[EOS]") else text


@functools.cache
def opencc():
    """OpenCC's converter from traditional to simplified characters. Raises ValueError where OpenCC is not installed."""
    try:
        return importlib.import_module("opencc").OpenCC("t2s")
    except ImportError:
        raise ValueError("--to_simplified needs OpenCC:  pip install opencc") from None


def simplified(text):
    return opencc().convert(text) if isinstance(text, str) else text


def grouped(rows: Iterable, size: int) -> Iterator[list]:
    rows = iter(rows)
    while batch := [row for _, row in zip(range(size), rows)]:
        yield batch


def clean(inputs: list[str], source: str, out: str, fields: list[str], min_chars: int, max_chars: int, workers: int,
          to_simplified: bool = False) -> None:
    check_folder(Path(out).parent)
    check_outputs(inputs, [Path(out)])
    files, counts, problems = input_files(inputs, [out]), Problems(), Problems()
    if to_simplified:
        opencc()  # fails early

    def jobs() -> Iterator[CleanJob]:
        for path in files:
            first = 1
            for rows in grouped(raw_rows(path, source, problems), CLEAN_ROWS):
                if source == "pairs" and first == 1 and not set(fields) <= rows[0].keys():
                    raise ValueError(f"{path} has no column {' or '.join(f for f in fields if f not in rows[0])}; its columns are {', '.join(map(str, rows[0]))}")
                yield CleanJob(path, first, rows, source, fields, min_chars, max_chars, to_simplified)
                first += len(rows)

    with Writer(out, PREFERENCE if source == "preference" else PAIR) as writer:
        for kept, dropped in in_order(clean_rows, jobs(), workers):
            for row in kept:
                writer.write(row)
            counts["kept"] += len(kept)
            for reason, where in dropped:
                counts.note(reason, where)
        for reason in [r for r in problems if not r.startswith("byte")]:
            counts.note(reason, problems.first[reason], problems.pop(reason))
        report(counts, problems)
        if not counts["kept"]:
            raise ValueError(f"no row was kept, and nothing was written; is {' '.join(inputs)} of the source {source}?")


# --- dedup ----------------------------------------------------------------------------------------------------------------------------

SHINGLE, BINS = 5, 128  # characters a shingle, values a signature
EMPTY, FACTOR = np.uint32(0xFFFFFFFF), 0x9E3779B97F4A7C15
DONORS = np.random.default_rng(1).permuted(np.tile(np.arange(BINS), (64, 1)), axis=1)
BATCH_CHARS = 1 << 18  # texts are compared in batches of about this many characters
FIRST, BEFORE, MOST = 4, 2, 32  # in a bucket a text is compared with so many of the first and of those before it; in all
IGNORED_KINDS = ("P", "Z", "Cc", "Cf")  # punctuation, spaces, control and format characters
KEPT_CHAR = np.array([not unicodedata.category(chr(c)).startswith(IGNORED_KINDS) for c in range(0x20000)] + [True] * (0x110000 - 0x20000))


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of every text's 5-grams of characters, one text after the other, and how many each has.

    Punctuation and spaces do not count. A text shorter than a shingle is one, with zeros behind; an empty one has none.
    """
    codes = to_codepoints("".join(texts))
    kept = KEPT_CHAR[codes]
    ends = np.concatenate([[0], np.cumsum(kept)])[np.cumsum([0] + [len(text) for text in texts])]
    codes = np.append(codes[kept].astype(np.uint64), np.zeros(SHINGLE - 1, np.uint64))
    begins, sizes = ends[:-1], np.diff(ends)
    factor, square = np.uint64(FACTOR), np.uint64(FACTOR * FACTOR % 2 ** 64)
    pair = codes[:-1] * factor + codes[1:]  # a polynomial in the factor, of the 5 characters from each on
    hashes = (pair[:-3] * square + pair[2:-1]) * factor + codes[4:]
    short = np.flatnonzero((sizes > 0) & (sizes < SHINGLE))
    value = np.zeros(len(short), np.uint64)
    for i in range(SHINGLE):
        value = value * factor + np.where(i < sizes[short], codes[np.minimum(begins[short] + i, len(codes) - 1)], np.uint64(0))
    hashes[begins[short]] = value
    whole = np.ones(len(hashes), dtype=bool)
    for i in range(1, SHINGLE):  # those that begin so near the end that they read the next text
        whole[ends[1:][sizes >= i] - i] = False
    whole[begins[short]] = True
    hashes = hashes[whole]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    return hashes, np.where(sizes > 0, np.maximum(sizes - SHINGLE + 1, 1), 0)


def minhash(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (N, 128) uint32, whose share of equal values estimates Jaccard's similarity, and shingle counts (N,).

    A shingle's hash names a bin and a value, and a bin keeps its least value (one permutation). An empty bin takes that
    of a full one, by an order of preference of its own: step by step from the bin that a random permutation names.

        5 . . 7  with permutations 1 0 3 2 and 2 3 0 1:  5 5 7 7       . . . 7  ->  . . 7 7  ->  7 7 7 7
    """
    hashes, counts = shingles(texts)
    place = np.repeat(np.arange(len(texts)) * BINS, counts)
    place += (hashes >> np.uint64(57)).view(np.int64)
    signatures = np.full(len(texts) * BINS, EMPTY)
    np.minimum.at(signatures, place, (hashes & np.uint64(0x7FFFFFFF)).astype(np.uint32))
    signatures = signatures.reshape(-1, BINS)
    for donor in DONORS[:6]:
        np.copyto(signatures, signatures[:, donor], where=signatures == EMPTY)
    for donor in DONORS[6:]:  # what few shingles have not filled yet
        rows = np.flatnonzero((signatures == EMPTY).any(1) & (counts > 0))
        if not len(rows):
            break
        part = signatures[rows]
        signatures[rows] = np.where(part == EMPTY, part[:, donor], part)
    return signatures, counts


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the strictest that lets through 99 % of the pairs at the threshold, 1 - (1 - t^rows)^bands."""
    rows = max(r for r in range(1, 65) if r == 1 or 1 - (1 - threshold ** r) ** (BINS // r) >= 0.99)
    return BINS // rows, rows


def sketch(job: tuple[list[str], int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(texts, bands, rows) -> a hash of each whole text (N,) uint64, and keys of its bands (bands, N) uint32."""
    texts, bands, rows = job
    exact = np.fromiter((xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts), np.uint64, len(texts))
    signatures, counts = minhash(texts)
    keys = np.zeros((len(texts), bands), dtype=np.uint64)
    for i in range(rows):  # band k is the values k, k + bands, k + 2 bands, ...
        keys = (keys ^ signatures[:, i * bands:(i + 1) * bands]) * np.uint64(FACTOR)
        keys ^= keys >> np.uint64(32)
    keys[counts == 0] = exact[counts == 0, None]  # nothing to compare: alike only to itself
    return exact, keys.T.astype(np.uint32)


def in_threads(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """function(job) of every job, in their order; numpy lets other threads run while it works on arrays."""
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future] = deque()
        for job in jobs:
            running.append(pool.submit(function, job))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def candidates(exact: np.ndarray, bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """exact (N,), and for every band its keys (N,) -> True (N,) for the first of equal texts; pairs (M,) uint64 of others
    that agree in a band, each once, as later << 32 | earlier, ascending."""
    first = np.zeros(len(exact), dtype=bool)
    first[np.unique(exact, return_index=True)[1]] = True
    rows, pairs = np.flatnonzero(first).astype(np.uint64), np.empty(0, np.uint64)
    for keys in bands:
        bucket = np.sort(keys[first].astype(np.uint64) << np.uint64(32) | rows)  # by key, then row
        key = bucket >> np.uint64(32)
        same = np.concatenate([[False], key[1:] == key[:-1], [False]])
        if not same.any():
            continue
        members = bucket[same[:-1] | same[1:]]  # those that are not alone
        begins = np.flatnonzero(np.append(True, members[1:] >> np.uint64(32) != members[:-1] >> np.uint64(32)))
        place = np.arange(len(members)) - np.repeat(begins, np.diff(np.append(begins, len(members))))  # in its bucket
        members &= np.uint64(0xFFFFFFFF)
        found = [pairs]
        for back in (*range(1, BEFORE + 1), *(place - i for i in range(FIRST))):
            near = np.flatnonzero((back > 0) & (back <= place))
            found.append(members[near] << np.uint64(32) | members[near - (back if isinstance(back, int) else back[near])])
        pairs = np.unique(np.concatenate(found))
        later = pairs >> np.uint64(32)
        pairs = pairs[np.append(np.ones(MOST, bool), later[MOST:] != later[:-MOST])[:len(pairs)]]
    return first, pairs


def shingle_sets(texts: list[str]) -> list[np.ndarray]:
    """The distinct shingles of each text, as 32-bit hashes, ascending."""
    hashes, counts = shingles(texts)
    packed = np.unique(np.repeat(np.arange(len(texts), dtype=np.uint64) << np.uint64(32), counts) | hashes >> np.uint64(32))
    return np.split(packed.astype(np.uint32), np.searchsorted(packed, np.arange(1, len(texts), dtype=np.uint64) << np.uint64(32)))


def jaccard(left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """(M,) similarities of M pairs of sets: what both have, by what one or the other has."""
    sizes = np.array([len(a) + len(b) for a, b in zip(left, right)], dtype=np.int64)
    both = np.concatenate([np.empty(0, np.uint32), *(part for pair in zip(left, right) for part in pair)]).astype(np.uint64)
    both |= np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(32), sizes)
    both.sort()
    common = np.bincount((both[1:][both[1:] == both[:-1]] >> np.uint64(32)).astype(np.int64), minlength=len(sizes))
    return common / (sizes - common)


def verdicts(items: Iterable, text_of: Callable, threshold: float = 0.85, against: Iterable[str] = (), workers: int = 1) -> Iterator[tuple[object, str]]:
    """Every item with "" if it stays, else why not: of near-duplicates the first stays.

    An item goes when its text is that of an earlier item, or when it has the Jaccard similarity `threshold` or more to one
    that stays. MinHash proposes the pairs and the exact similarity decides. Texts of `against` come before all items.
    Both are read twice: for the sketches (8 bytes a text and 4 a band), and to compare, when only the texts that have a candidate
    still to come are held.
    """
    bands, rows = banding(threshold)
    jobs = ((texts, bands, rows) for texts in batches(chain(against, map(text_of, items)), BATCH_CHARS))
    sketches = list(in_threads(sketch, jobs, workers))
    if not sketches:
        return
    first, pairs = candidates(np.concatenate([exact for exact, _ in sketches]),
                              (np.concatenate([keys[band] for _, keys in sketches]) for band in range(bands)))
    del sketches
    later, earlier = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    keep, needed, last_use = first.copy(), np.zeros(len(first), dtype=bool), np.zeros(len(first), dtype=np.uint32)
    needed[later] = needed[earlier] = True
    last_use[earlier] = later  # these ascend, so that the last one is left
    sets: dict[int, np.ndarray] = {}
    end = 0
    for batch in batches(chain(((text, None) for text in against), ((text_of(item), item) for item in items)), BATCH_CHARS, lambda each: len(each[0])):
        begin, end = end, end + len(batch)
        if len(held := begin + np.flatnonzero(needed[begin:end])):
            sets.update(zip(held.tolist(), shingle_sets([batch[i - begin][0] for i in held])))
        here = np.arange(*np.searchsorted(later, [begin, end]))
        head = here[(earlier[here] < begin) & np.append(True, np.diff(later[here]) > 0)[:len(here)]]
        for some in (head, here):  # first each text with its first candidate: enough where many are alike
            left, right = earlier[some], later[some]
            alive = keep[left] & keep[right]
            left, right = left[alive].tolist(), right[alive].tolist()
            near = jaccard([sets[i] for i in left], [sets[j] for j in right]) >= threshold
            for i, j in compress(zip(left, right), near.tolist()):  # by the later one, so that keep[i] is settled
                keep[j] &= ~keep[i]
        for i in [i for i in sets if last_use[i] < end or not keep[i]]:
            del sets[i]
        for (_, item), stays, new in zip(batch, keep[begin:end].tolist(), first[begin:end].tolist()):
            if item is not None:
                yield item, "" if stays else NEAR if new else EQUAL


def dedup_indices(texts: Iterable[str], threshold: float = 0.85, against: Iterable[str] = (), workers: int | None = None) -> np.ndarray:
    """Sorted indices (int64) of the texts to drop: each is a near-duplicate of an earlier one that stays, or of one of
    `against`. Near is a Jaccard similarity of the sets of character 5-grams of threshold or more, from above 0 to 1.
    workers: threads, by default as many as there are cores."""
    texts = texts if isinstance(texts, list) else list(texts)
    told = verdicts(texts, str, threshold, list(against), workers or os.cpu_count() or 1)
    return np.flatnonzero(np.fromiter((why != "" for _, why in told), bool, len(texts)))


class Rows:
    """The whole rows of files, to be read as often as one likes; columns: prompt, response or prompt, chosen, rejected.
    outputs: what the command writes, and does not read."""

    def __init__(self, paths: list[str], outputs: Iterable[Path] = ()):
        self.paths, self.problems, self.outputs = paths, Problems(), list(outputs)
        check_outputs(paths, self.outputs)
        head = next(read_rows(paths, Problems(), self.outputs), {})
        self.columns = PREFERENCE if set(PREFERENCE) <= head.keys() else PAIR
        others = [str(column) for column in head if column not in self.columns]
        if others and set(self.columns) <= head.keys():
            print(f"data.py: note: only {', '.join(self.columns)} are kept, not {', '.join(others)}", file=sys.stderr)

    def __iter__(self) -> Iterator[dict]:
        self.problems = Problems()
        return whole_rows(self.paths, self.columns, self.problems, self.outputs)

    def text(self, row: dict) -> str:
        return "\n".join([row[c] for c in self.columns])


def dedup(inputs: list[str], out: str, threshold: float, against: str | None, workers: int) -> None:
    rows = Rows(inputs, [Path(out)])
    others = Rows([against], [Path(out)]) if against else None
    texts = list(map(others.text, others)) if others else []
    if others:
        refuse_nothing(len(texts), [str(against)], others.problems)
        others.problems.warn()
    told, count = verdicts(rows, rows.text, threshold, texts, workers), Problems()
    with Writer(out, rows.columns) as writer:
        for row, why in told:
            count[why or "kept"] += 1
            if not why:
                writer.write(row)
        refuse_nothing(count["kept"], inputs, rows.problems)
    report(count, rows.problems)


# --- split, stats ------------------------------------------------------------------------------------------------------------------------

def split(inputs: list[str], out: str, valid: float, test: float) -> None:
    """By a hash of the prompt: equal questions fall on one side, and a row keeps its side when data is added."""
    if valid + test >= 1:
        raise ValueError(f"--valid {valid} and --test {test} leave nothing to train on")
    rows, counts = Rows(inputs, [Path(out) / f"{side}.parquet" for side in ("train", "valid", "test")]), Problems()
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(Writer(Path(out) / f"{side}.parquet", rows.columns))
                 for side, share in (("train", 1.0), ("valid", valid), ("test", test)) if share}
        for row in rows:
            share = xxhash.xxh3_64_intdigest(row["prompt"].encode("utf-8", "surrogatepass")) / 2 ** 64
            sides["test" if share < test else "valid" if share < test + valid else "train"].write(row)
        for writer in sides.values():
            writer.finish()  # all of them, before one is put in its place
            counts[str(writer.path)] = writer.total
        refuse_nothing(counts.total(), inputs, rows.problems)
    report(counts, rows.problems)
    for side in {"valid", "test"} - sides.keys():
        if (Path(out) / f"{side}.parquet").exists():
            print(f"data.py: warning: {Path(out) / side}.parquet is of an earlier split, and its rows may be in train.parquet now", file=sys.stderr)
    for writer in sides.values():
        if not writer.total:
            print(f"data.py: warning: {writer.path} has no rows: there are too few to give it its share", file=sys.stderr)


def stats(inputs: list[str], tokenizer: Tokenizer | None) -> None:
    rows, problems, lengths = 0, Problems(), {}
    tokens: Counter = Counter()
    for batch in grouped(read_rows(inputs, problems), ROW_GROUP):
        rows += len(batch)
        for column in dict.fromkeys(c for row in batch for c in row if c in (*PAIR, *PREFERENCE, "text")):
            texts = [row[column] for row in batch if isinstance(row.get(column), str)]
            lengths.setdefault(column, Counter()).update(map(len, texts))
            if tokenizer and texts:
                tokens[column] += len(tokenizer.encode_arrays(texts)[0])
    print(f"{rows:,} rows in {len(input_files(inputs))} files")
    for column, counter in lengths.items():
        count, chars = counter.total(), sum(n * c for n, c in counter.items())
        if rows > count:
            print(f"\n{column}: {rows - count:,} rows have no text here")
        if not count:
            continue
        print(f"\n{column}: {chars:,} characters, {chars / count:.1f} a row" + (
            f"; {tokens[column]:,} tokens, {tokens[column] / count:.1f} a row" if tokenizer else ""))
        edges = [0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, max(counter) + 1]
        bars = [sum(c for n, c in counter.items() if a <= n < b) for a, b in zip(edges, edges[1:])]
        for a, bar in zip(edges, bars):
            if bar:
                print(f"{a:>7}+ {bar:>11,} {'█' * max(1, round(50 * bar / max(bars)))}")
    problems.warn()


# --- PairStream: what training reads --------------------------------------------------------------------------------------------------------

def footprint(files: Iterable[str | Path]) -> str:
    """A hash of the files' contents, in their order."""
    digest = xxhash.xxh3_64()
    for path in files:
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, xxhash.xxh3_64).digest())
    return digest.hexdigest()


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text: a string type of any width, or a dictionary of one."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def text_column(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A text column of any type (see is_text) as large_string, the one type that every function of pyarrow takes."""
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array([text_column(chunk) for chunk in column.chunks], pa.large_string())
    if pa.types.is_dictionary(column.type):
        return column.dictionary.cast(pa.large_string()).take(column.indices)
    return column.cast(pa.large_string())


def open_parquet(path, columns: tuple[str, ...]) -> pq.ParquetFile:
    """Raises FileNotFoundError, or ValueError for a damaged file or one without the (string) columns."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path} is not a whole Parquet file: {e}") from None
    for column in columns:
        index = file.schema_arrow.get_field_index(column)
        if file.schema_arrow.names.count(column) > 1:
            raise ValueError(f"{path} has the column {column!r} twice")
        if index < 0:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        kind = file.schema_arrow.field(index).type
        if not is_text(kind):
            raise ValueError(f"{path}: column {column!r} holds {kind}, not text")
    return file


readers: dict[tuple[str, int], tuple[int, Iterator]] = {}  # row groups that this process has read in part: how far


def read_rows_of(path: str, group: int, begin: int, end: int, columns: tuple[str, ...]) -> pa.Table:
    """Rows begin to end of a row group, without holding it whole. What follows is at hand for the next call."""
    at, parts = readers.pop((path, group), (0, None))
    if parts is None or at > begin:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        at, parts = 0, file.iter_batches(SLICE_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
    taken = []
    while at < end and (part := next(parts, None)) is not None:
        taken += [part] if at >= begin else []
        at += len(part)
    readers.clear()  # one is enough: a worker goes through a row group from front to end
    readers[path, group] = at, parts
    table = pa.Table.from_batches(taken).slice(0, end - begin)
    return pa.table({column: text_column(table[column]) for column in columns})


def read_window(slices: list[tuple[str, int, int, int, int]], columns: tuple[str, ...], tokenizer: Tokenizer,
                max_len: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, str, int]:
    """Rows of slices (file, row group, first row in it, rows, first row in all), tokenized.

    -> for each column the ids of the usable rows, one after the other, and how many each has; the numbers of the usable
    rows (N,); where the first unusable one is; how many there are.
    """
    tables, numbers, unusable, first = [], [], 0, ""
    for path, group, begin, rows, before in slices:
        try:
            table = read_rows_of(path, group, begin, begin + rows, columns)
            table.validate(full=True)  # text that is not UTF-8, too
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{path}: row group {group} cannot be read: {' '.join(str(e).split())}") from None
        usable = np.ones(len(table), dtype=bool)
        for column in columns:  # a row with a null or an empty text teaches nothing
            usable &= pc.fill_null(pc.greater(pc.binary_length(table[column]), 0), False).to_numpy()
        if not usable.all():
            first = first or f"{path}, row group {group}, row {begin + int(usable.argmin()) + 1:,}"
            unusable += int((~usable).sum())
        tables.append(table.filter(pa.array(usable)))
        numbers.append(before + np.flatnonzero(usable))
    table, numbers = pa.concat_tables(tables), np.concatenate(numbers)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    out = []
    for column in columns:
        ids, lengths = [np.empty(0, dtype)], [np.empty(0, np.int64)]
        for at in range(0, len(numbers), SLICE_ROWS):
            # a text is cut before it is tokenised where more of it could hardly count, and after it at max_len tokens
            texts = pc.utf8_slice_codeunits(table[column].slice(at, SLICE_ROWS), 0, MOST_CHARS_PER_TOKEN * max_len)
            flat, sizes = tokenizer.encode_arrays(texts.to_pylist())
            cut = np.minimum(sizes, max_len)
            flat = flat[joined_ranges(np.cumsum(sizes) - sizes, cut)]
            flat[np.cumsum(cut) - 1] = EOS  # also where a text was cut
            ids.append(flat.astype(dtype))
            lengths.append(cut)
        out.append((np.concatenate(ids), np.concatenate(lengths)))
    return out, numbers, first, unusable


def plan_batches(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of similar lengths together: (N, columns) token counts -> arrays of row numbers, in random order.

    A batch of B rows padded to the longest of each column has at most `budget` cells, B * (S + T). The rows are cut in two,
    by the length of one column, where the cells of both halves, padded, and a little for every batch that they will make,
    are fewest; and so the halves, until each fits.

        T |  . .  |  .          a cut by S, and in each half one by T: rows of similar S and T are left together
          |-. . --|
          |  . .  |- . -
          +------------- S
    """
    batches, halves = [], [rng.permutation(len(lengths))] if len(lengths) else []
    while halves:
        rows = halves.pop()
        if len(rows) * lengths[rows].max(0).sum() <= budget:
            batches.append(rows)
            continue
        best, below = np.inf, np.arange(1, len(rows))
        for column in range(lengths.shape[1]):
            order = np.argsort(lengths[rows, column], kind="stable")
            width = lengths[rows[order]]
            cost = np.zeros(len(below))
            for count, widest in ((below, np.maximum.accumulate(width)[:-1]), (below[::-1], np.maximum.accumulate(width[::-1])[-2::-1])):
                cells = widest.sum(1)
                cost += count * cells + 0.3 * budget * -(-count // (budget // cells))
            least = np.flatnonzero(cost == cost.min())
            at = least[np.abs(least - len(rows) // 2).argmin()]  # of equals the most even
            if cost[at] < best:
                best, cut = cost[at], (rows[order[:at + 1]], rows[order[at + 1:]])
        halves += cut
    return [batches[i] for i in rng.permutation(len(batches))]


class PairStream:
    """Batches of token ids, for ever, epoch after epoch; a dict of int64 tensors each.

    input_ids (B, S) and attention_mask (B, S), padding 0; labels (B, T), padding -100. B * (S + T) <= micro_batch_tokens.
    With columns (prompt, chosen, rejected), labels are chosen_labels and rejected_labels, both count, and rows (B,) are
    the rows' numbers, counted through the files. round_to: S and T are rounded up to a multiple of it, for compiled kernels.

    The sequence of batches is a function of (files, seed, epoch) alone. Row groups are shuffled and gathered in windows
    (a very large row group is several); a window's rows are shuffled, sorted into batches of similar lengths, and the
    batches shuffled. Rank r of W takes the batches r, r + W, ...; with `group` G it takes from every G batches those, so
    that a training step is a group. A rank whose number is G or more has no batches; next_group() moves it on.

        row groups  3 0 2 | 5 1 4     windows     | b b b b b | b b b b      batches     rank 0 of 2:  b . b . b . b . b

    Every rank tokenizes every window itself: ranks never wait for each other here. state is where the next group begins:
    {"epoch", "window", "batch"}, and PairStream(..., state=state) goes on from there. Rows that are null or empty in a
    column are skipped and reported once on stderr. Raises FileNotFoundError or ValueError (see open_parquet), and
    ChildProcessError when a background process was killed.
    """

    def __init__(self, files, tokenizer: Tokenizer, micro_batch_tokens: int = 8192, max_len: int = 320, seed: int = 0,
                 rank: int = 0, world_size: int = 1, state: dict | None = None, group: int | None = None,
                 columns: tuple[str, ...] = PAIR, workers: int = 0, round_to: int = 1):
        files = [str(f) for f in ([files] if isinstance(files, (str, Path)) else files)]
        if micro_batch_tokens < len(columns) * -(-max_len // round_to) * round_to:
            raise ValueError(f"micro_batch_tokens {micro_batch_tokens} cannot hold one row of {len(columns)} x max_len {max_len} tokens")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        if not getattr(tokenizer, "append_eos", True):  # the model must be told where a text ends
            tokenizer = copy.copy(tokenizer)
            tokenizer.append_eos = True
        self.tokenizer, self.columns, self.max_len, self.seed = tokenizer, columns, max_len, seed
        self.micro_batch_tokens, self.workers, self.round_to = micro_batch_tokens, workers, round_to
        self.group = group or world_size
        self.own = range(rank, self.group, world_size)  # this rank's batches of a group
        self.state = dict(state or {"epoch": 0, "window": 0, "batch": 0})
        self.row_groups, self.rows = [], 0  # each a list of slices, with the share of a window that it takes
        for path in files:
            file = open_parquet(path, columns)
            indices = [i for i in range(len(file.schema)) if file.schema.column(i).path in columns]
            for g in range(file.num_row_groups):
                meta = file.metadata.row_group(g)
                size = sum(meta.column(i).total_uncompressed_size for i in indices)
                share = max(meta.num_rows / WINDOW_ROWS, size / WINDOW_BYTES)
                step = -(-meta.num_rows // max(1, math.ceil(share) * SLICE_ROWS)) * SLICE_ROWS or 1
                sizes = [(at, min(step, meta.num_rows - at)) for at in range(0, meta.num_rows, step)]
                self.row_groups.append([((path, g, at, rows, self.rows + at), share * rows / meta.num_rows) for at, rows in sizes])
                self.rows += meta.num_rows
        if not self.rows:
            raise ValueError(f"{', '.join(files)}: no rows")
        self._pool: ProcessPoolExecutor | None = None
        self._windows: dict[tuple[int, int], Future | tuple] = {}
        self._plans: dict[int, list] = {}
        self._warned = rank > 0

    def windows(self, epoch: int) -> list[list[tuple]]:
        """The epoch's row groups, shuffled, in windows."""
        if epoch not in self._plans:
            windows, filled = [[]], 0.0
            for i in np.random.default_rng([self.seed, epoch]).permutation(len(self.row_groups)):
                for piece, share in self.row_groups[i]:
                    if filled + share > 1 and windows[-1]:
                        windows.append([])
                        filled = 0.0
                    windows[-1].append(piece)
                    filled += share
            self._plans = {epoch: windows}
        return self._plans[epoch]

    def _after(self, epoch: int, window: int) -> tuple[int, int]:
        return (epoch, window + 1) if window + 1 < len(self.windows(epoch)) else (epoch + 1, 0)

    def _load(self, epoch: int, window: int) -> tuple[list, np.ndarray, list]:
        """A window's columns (ids, offsets (N + 1,)), row numbers and batches; the next windows are begun in the background."""
        try:
            return self._load_and_prefetch(epoch, window)
        except BrokenProcessPool:
            raise ChildProcessError("a process that reads the training data was killed (is there enough memory? --workers 0 needs "
                                    "the least)") from None

    def _load_and_prefetch(self, epoch: int, window: int) -> tuple[list, np.ndarray, list]:
        want = ahead = (epoch, window)
        for _ in range(1 + self.workers):
            if ahead not in self._windows:
                job = read_window, self.windows(ahead[0])[ahead[1]], self.columns, self.tokenizer, self.max_len
                if not self.workers or ahead == want:  # the very first: a worker would come later
                    self._windows[ahead] = job[0](*job[1:])
                else:
                    if self._pool is None:
                        self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), serve_from_behind)
                    with main_module_hidden():
                        self._windows[ahead] = self._pool.submit(*job)
            ahead = self._after(*ahead)
        loaded = self._windows[want]
        if isinstance(loaded, Future):
            loaded = loaded.result()
        if len(loaded) == 4:
            columns, numbers, first, unusable = loaded
            if unusable and not self._warned:
                print(f"warning: rows without text in {' or '.join(self.columns)} are skipped (first: {first})", file=sys.stderr)
                self._warned = True
            lengths = np.stack([column[1] for column in columns], axis=1)
            rounded = -(-lengths // self.round_to) * self.round_to
            batches = plan_batches(rounded, self.micro_batch_tokens, np.random.default_rng([self.seed, epoch, window]))
            loaded = [(ids, np.concatenate([[0], np.cumsum(sizes)])) for ids, sizes in columns], numbers, batches
        self._windows[want] = loaded
        return loaded

    def locate(self, epoch: int, window: int, batch: int) -> tuple[int, int, int]:
        """The same place with batch inside the window: counts on into the windows that follow."""
        empty = 0
        while batch >= (n := len(self._load(epoch, window)[2])):
            batch, (epoch, window), empty = batch - n, self._after(epoch, window), empty + 1 if n == 0 else 0
            if empty > len(self.windows(epoch)):
                raise ValueError("no row has text in every one of the columns " + ", ".join(self.columns))
        return epoch, window, batch

    @property
    def epoch(self) -> float:
        """How many epochs are behind the state, with the fraction of the present one in rows."""
        epoch, window, batch = self.locate(**self.state)
        sizes = [sum(rows for _, _, _, rows, _ in pieces) for pieces in self.windows(epoch)]
        return epoch + (sum(sizes[:window]) + sizes[window] * batch / len(self._load(epoch, window)[2])) / sum(sizes)

    def _batch(self, epoch: int, window: int, batch: int) -> dict:
        import torch
        columns, numbers, batches = self._load(epoch, window)
        rows = batches[batch]
        padded = []
        for (ids, offsets), padding in zip(columns, [PAD] + [IGNORED] * len(columns)):
            lengths = offsets[rows + 1] - offsets[rows]
            grid = np.full((len(rows), -(-lengths.max() // self.round_to) * self.round_to), padding, dtype=np.int64)
            inside = np.arange(grid.shape[1]) < lengths[:, None]
            grid[inside] = ids[np.repeat(offsets[rows], lengths) + inside.nonzero()[1]]
            padded.append(torch.from_numpy(grid))
            if padding == PAD:
                mask = torch.from_numpy(inside.astype(np.int64))
        made = {"input_ids": padded[0], "attention_mask": mask}
        if len(columns) == 2:
            return {**made, "labels": padded[1]}
        return {**made, **{f"{c}_labels": p for c, p in zip(self.columns[1:], padded[1:])}, "rows": torch.from_numpy(numbers[rows])}

    def next_group(self) -> Iterator[dict]:
        """This rank's batches of the next group: none where the group is smaller than the rank's number. The state moves
        behind the group before the last of them is yielded, so that a checkpoint taken then does not repeat it."""
        epoch, window, batch = self.locate(**self.state)
        for old in [w for w in self._windows if w < (epoch, window)]:
            del self._windows[old]
        behind = {"epoch": epoch, "window": window, "batch": batch + self.group}
        places = [self.locate(epoch, window, batch + j) for j in self.own]
        for place in places[:-1]:
            yield self._batch(*place)
        last = self._batch(*places[-1]) if places else None
        self.state = behind
        if last is not None:
            yield last

    def __iter__(self) -> Iterator[dict]:
        if not self.own:
            raise ValueError("this rank has no batches: the group is smaller than the number of ranks")
        while True:
            yield from self.next_group()

    def successions(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all texts of the first window but the prompts: the token in front of each, PAD at a beginning, and the tokens, (N,) int64."""
        before, after = [], []
        for ids, offsets in self._load(0, 0)[0][1:]:
            shifted = np.roll(ids, 1)
            shifted[offsets[:-1]] = PAD
            before.append(shifted)
            after.append(ids)
        return np.concatenate(before).astype(np.int64), np.concatenate(after).astype(np.int64)

    def one_epoch(self) -> Iterator[dict]:
        """The own batches of epoch 0, once; the state stays as it is."""
        for window in range(len(self.windows(0))):
            for batch in range(len(self._load(0, window)[2])):
                if batch % self.group in self.own:
                    yield self._batch(0, window, batch)
            del self._windows[0, window]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


HIDING = threading.Lock()


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """A process spawned here does not import the program that it belongs to, such as train.py and with it torch: two seconds."""
    main = vars(sys.modules["__main__"])
    with HIDING:
        hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
        try:
            main.update(dict.fromkeys(hidden))
            yield
        finally:
            main.update(hidden)


def serve_from_behind() -> None:
    """In a background process: take what time the training leaves, and end when the process that began this one has gone, however it went."""
    if hasattr(os, "nice"):
        os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(0)
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = ArgumentParser(description="Pairs of prompt and response: make, clean, deduplicate, split, count.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, inputs: bool = True, out: str | None = None):
        sub = commands.add_parser(name, help=text, description=text)
        if inputs:
            sub.add_argument("input", nargs="+", metavar="IN", help=".parquet .jsonl .json .csv .txt, .gz, or folders of them")
        if out:
            sub.add_argument("--out", required=True, metavar=out, help="where to write")
        return sub

    demo = command("demo", "questions and answers from tables of facts", inputs=False, out="DIR")
    demo.add_argument("--seed", type=number(int, 0), default=0, help="of the shuffling and of what is held out")
    sub = command("clean", "a public dump becomes clean pairs", out="X.parquet")
    sub.add_argument("--source", required=True, choices=sorted(SOURCES), help="whose fields and filters to use")
    sub.add_argument("--prompt_field", help="column of the prompt, for --source pairs (default: prompt)")
    sub.add_argument("--response_field", help="column of the response, for --source pairs (default: response)")
    sub.add_argument("--min_chars", type=number(int, 1), default=5, help="shortest response, in characters")
    sub.add_argument("--max_chars", type=number(int, 1), default=1024, help="longest prompt and response, in characters")
    sub.add_argument("--to_simplified", action="store_true", help="convert traditional characters to simplified ones (needs OpenCC)")
    dedup_command = command("dedup", "near-duplicates go, the first of each stays", out="X.parquet")
    dedup_command.add_argument("--threshold", type=number(float, 0, 1, above=True), default=0.85, help="Jaccard similarity of character 5-grams")
    dedup_command.add_argument("--against", metavar="Y.parquet", help="drop what is too close to these pairs, too")
    for one in (sub, dedup_command):
        one.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="processes")
    sub = command("split", "train.parquet, valid.parquet and test.parquet, by a hash of the prompt", out="DIR")
    sub.add_argument("--valid", type=number(float, 0, 1), default=0.01, help="share of the pairs")
    sub.add_argument("--test", type=number(float, 0, 1), default=0.0, help="share of the pairs")
    sub = command("stats", "rows, characters, lengths, tokens")
    sub.add_argument("--tokenizer", metavar="DIR", help="count its tokens, too")
    args = parser.parse_args()
    if args.command == "clean" and args.source != "pairs" and (args.prompt_field or args.response_field):
        parser.error("--prompt_field and --response_field are for --source pairs")
    if args.command == "demo":
        for path, pairs in write_demo(args.out, args.seed).items():
            print(f"{path}: {pairs:,} pairs")
    elif args.command == "clean":
        clean(args.input, args.source, args.out, [args.prompt_field or "prompt", args.response_field or "response"], args.min_chars, args.max_chars, args.workers,
              args.to_simplified)
    elif args.command == "dedup":
        dedup(args.input, args.out, args.threshold, args.against, args.workers)
    elif args.command == "split":
        split(args.input, args.out, args.valid, args.test)
    else:
        stats(args.input, Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None)


if __name__ == "__main__":
    run(main)
