"""Facts and a random generator in, one question with its answer out.

The topics below are all that nano can be asked, the honest refusals included. The questions of one
topic are paraphrases with one answer, so that the wording matters little.
"""

import random
from collections.abc import Callable

from . import sentences as say
from .facts import Facts
from .names import NO_KIND, group_noun, vocabulary, with_article

DESCRIBE = {
    "short": "Describe this picture in one short sentence.",
    "normal": "Describe this picture.",
    "long": "Describe this picture in detail.",
}
Answer = Callable[[Facts], str]


def _fixed(text: str) -> Answer:
    return lambda _facts: text


def _refusal(what_exactly: str) -> Answer:
    return lambda f: f"{say.cannot(what_exactly)} {say.subject(f)}"


# (weight, answer, questions)
TOPICS: tuple[tuple[float, Answer, tuple[str, ...]], ...] = (
    (8, say.short, (DESCRIBE["short"], DESCRIBE["short"], "Describe the image in one sentence.",
                    "Briefly describe this photo.", "Describe it in a few words.",
                    "Summarize the picture in one sentence.")),
    (16, say.normal, (DESCRIBE["normal"], DESCRIBE["normal"], "Describe this image.",
                      "Describe the photo.", "What do you see?", "What do you see in this photo?",
                      "What does this picture show?", "Can you describe this image?",
                      "Tell me about this picture.", "Please describe the image.")),
    (10, say.long, (DESCRIBE["long"], DESCRIBE["long"], "Describe this image in detail.",
                    "Please describe this photo in detail.", "Give a detailed description.",
                    "Tell me everything you can see in the picture.")),
    (3, say.caption, ("Write a caption for this image.", "Give the photo a short title.",
                      "Caption this picture.", "Suggest a title.")),
    (12, say.what, ("What is this?", "What is in this picture?", "What is in the image?",
                    "What is it?", "What is the main object in this image?", "What's this?",
                    "What is the main subject of the photo?", "Name the main thing in the photo.",
                    "What object is shown?", "What's in the photo?", "Identify the object.")),
    (6, say.colors, ("What color is it?", "What colors are in this image?", "What colour is it?",
                     "What is the main color of the picture?", "What are the main colors?",
                     "Which colours do you see?", "What color is the object?")),
    (2, say.background, ("What color is the background?", "What is the background color?",
                         "What colour is behind it?")),
    (4, say.people, ("Is there a person in this picture?", "Are there any people in the image?",
                     "Do you see people?", "Can you see a person?", "Is there anybody in it?",
                     "Are there people in the photo?")),
    (1.5, say.man_or_woman, ("Is there a man in the picture?", "Do you see a woman?",
                             "Is it a man or a woman?", "Is there a girl?", "Do you see a boy?")),
    (2, say.people_count, ("How many people are there?", "How many people do you see?",
                           "How many persons are in the photo?", "How many faces are there?")),
    (2, say.tone, ("Is the picture dark or bright?", "Is it dark?", "How bright is the photo?",
                   "How is the lighting?")),
    (1, say.monochrome, ("Is it a black-and-white photo?", "Is the picture in color?",
                         "Is this image black and white?")),
    (2, say.sure, ("Are you sure?", "How sure are you?", "How certain are you about that?",
                   "Are you certain?")),
    (1.5, say.alternative, ("What else could it be?", "Could it be something else?",
                            "What is your second guess?")),
    (3, _fixed(say.cannot("read text in pictures")),
     ("What does the sign say?", "Read the text.", "What is written here?",
      "What does the text say?", "Can you read this?", "What number is on it?",
      "What is the title of the book?", "Transcribe the text in the image.",
      "What words do you see?", "What does it say?", "What time does the clock show?")),
    (3, _refusal("count things in pictures"),
     ("How many are there?", "How many objects are in the picture?", "How many animals are there?",
      "How many dogs are there?", "How many cars do you see?", "How many birds do you see?",
      "Count the apples.", "How many flowers are there?", "How many things are in the image?",
      "How many legs does it have?", "How many cats are in the photo?", "How many coins are there?",
      "Count the objects.")),
    (3, _refusal("tell where things are in a picture"),
     ("Where is it?", "Where is the cat?", "Where is the object in the picture?",
      "What is on the left?", "What is in the background?", "What is behind it?",
      "What is in the top right corner?", "Is it on the left or on the right?",
      "What is next to it?", "Where in the image is the dog?", "What is on the table?")),
    (3, _refusal("tell what is happening in a picture"),
     ("What is happening?", "What is it doing?", "What is the person doing?",
      "What is the animal doing?", "What is going on in this picture?", "What is he doing?",
      "Is it sleeping?", "Is it running?", "What are they doing?")),
    (2, _fixed(say.cannot("tell where or when a photo was taken")),
     ("Where was this photo taken?", "When was this picture taken?", "What place is this?",
      "Which city is this?", "What season is it?", "What time of day is it?",
      "In which country is this?", "Is it indoors or outdoors?", "What year is it?")),
    (2, _fixed(say.cannot("tell who people are, how old they are or how they feel")),
     ("Who is this?", "Who is in the picture?", "How old is the person?", "Is she happy?",
      "What is his name?", "Do you know this person?", "How does the person feel?",
      "Is it a famous person?")),
    (2.5, _refusal("answer that from the picture"),
     ("How much does it cost?", "What brand is it?", "What is it made of?", "How heavy is it?",
      "How big is it?", "Is it healthy?", "Why is it there?", "Is it dangerous?",
      "Who made it?", "What happens next?", "Is it beautiful?", "What is its name?",
      "How old is it?", "What does it taste like?", "Is it male or female?",
      "What is the weather like?", "What is the person wearing?")),
    (1, _fixed("I can name the main subject of a photo, notice faces and estimate colors."),
     ("What can you do?", "What can you tell me?", "How can you help me?", "Who are you?",
      "What are you able to see?")),
)  # fmt: skip
PRESENCE_WEIGHT = 24.0
WHICH_WEIGHT = 7.0
PRESENCE = ("Is there {} in this picture?", "Does the image show {}?", "Is there {}?",
            "Do you see {}?", "Is this {}?", "Is it {}?", "Can you see {} in the photo?",
            "Does the picture contain {}?")  # fmt: skip
WHICH = ("What kind of {} is it?", "What {} is this?", "Which {} is shown?", "What {} do you see?",
         "What type of {} is this?", "Which {} is it?")  # fmt: skip
BREEDS = ("What breed is it?", "What breed of dog is this?", "Which breed of dog do you see?")


def ask(f: Facts, rng: random.Random) -> tuple[str, str]:
    """A random question about a photo with these facts, and the answer it deserves."""
    weights = [PRESENCE_WEIGHT, WHICH_WEIGHT, *(weight for weight, _, _ in TOPICS)]
    topic = rng.choices(range(len(weights)), weights)[0]
    if topic == 0:
        return _ask_presence(f, rng)
    if topic == 1:
        return _ask_which(f, rng)
    _, answer, questions = TOPICS[topic - 2]
    return rng.choice(questions), answer(f)


def _nouns(concept: int) -> list[str]:
    c = vocabulary().concepts[concept]
    kind = [] if c.kind == NO_KIND else [c.kind, c.kind]
    group = [] if c.group == "object" else [group_noun(c.group)]
    return [c.name, *kind, *group]


def _ask_presence(f: Facts, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        noun = rng.choice(_nouns(f.first if rng.random() < 0.85 else f.second))
    else:
        noun = _something_else(f, rng)
    question = rng.choice(PRESENCE).format(with_article(noun))
    if noun == "person":
        return question, say.people(f)
    return question, say.present(f, noun)


def _something_else(f: Facts, rng: random.Random) -> str:
    """A noun that is not in the photo; a third of the time one that is close to what is."""
    concepts = vocabulary().concepts
    c = concepts[f.first]
    near = [i for i, other in enumerate(concepts) if other.group == c.group]
    taken = {*_nouns(f.first), *_nouns(f.second)}
    while True:  # a small group may be taken whole, so every try draws the pool again
        pool = near if rng.random() < 0.35 else range(len(concepts))
        noun = rng.choice(_nouns(rng.choice(pool)))
        if noun not in taken and not any(noun in name or name in noun for name in taken):
            return noun


def _ask_which(f: Facts, rng: random.Random) -> tuple[str, str]:
    c = vocabulary().concepts[f.first]
    own = [noun for noun in (c.kind, group_noun(c.group)) if noun not in (NO_KIND, "object")]
    if own and rng.random() < 0.75:
        noun = rng.choice(own)
    else:
        groups = [group_noun(g) for g in vocabulary().groups if g not in ("object", "person")]
        noun = rng.choice([g for g in groups if g not in own])
    if noun == "dog" and rng.random() < 0.5:
        return rng.choice(BREEDS), say.which(f, noun)
    if noun == "person":
        return "Is there a person in this picture?", say.people(f)
    return rng.choice(WHICH).format(noun), say.which(f, noun)
