"""Day 22: build_chat - make day22/data/chat.jsonl from a package of dialogues, byte for byte the same each time.

    pip download --no-deps chatterbot-corpus==1.3.3
    python day22/labs/build_chat.py chatterbot_corpus-1.3.3-py2.py3-none-any.whl

Expect the number of pairs a topic. Each line is {"source": topic, "prompt": ..., "response": ...}.
Source: https://github.com/gunthercox/chatterbot-corpus, version 1.3.3, BSD 3-Clause.
"""

import argparse
import json
import zipfile
from collections import Counter
from pathlib import Path

import yaml  # PyYAML, which transformers brings along

HERE = Path(__file__).resolve().parents[1]  # the day's folder
# Left out: topics of opinions, insults and jokes; long program listings; dialogues of more than two turns.
TOPICS = ["ai", "botprofile", "computers", "emotion", "food", "greetings", "history", "literature", "money", "science"]
TOPICS += ["tech_support", "trivia"]
LEAVE_OUT = {"Bend over", "Can you mate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    wheel = zipfile.ZipFile(parser.parse_args().wheel)
    pairs = {}
    for topic in TOPICS:
        conversations = yaml.safe_load(wheel.read(f"chatterbot_corpus/data/english/{topic}.yml"))["conversations"]
        for prompt, *answers in (entry for entry in conversations if isinstance(entry, list)):
            for answer in answers:  # in these topics, several lines are several answers to the first
                pair = " ".join(str(prompt).split()), " ".join(str(answer).split())
                if pair[0] not in LEAVE_OUT and len(pair[1]) > 2:
                    pairs.setdefault(pair, topic)  # tech_support repeats ten pairs a hundred times
    with open(HERE / "data/chat.jsonl", "w", encoding="utf-8") as out:
        for (prompt, response), topic in pairs.items():
            row = {"source": topic, "prompt": prompt, "response": response}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} pairs: {dict(Counter(pairs.values()))}")


if __name__ == "__main__":
    main()
