"""Rule-made stories: plots with slots and choices, filled from words.py.

In a plot `{name}` is a slot and `[a|b]` a choice. `tell` fills one plot for one hero; the slots it used are returned,
so that a chat can ask about the story just told.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from dsv2cli.demo.words import ANIMALS, BOYS, COLORS, FOODS, GIRLS, GOOD, HEROES, PET_NAMES, PLACES, SMALL, TOYS, article

_CHOICE = re.compile(r"\[([^\[\]]*)\]")

OPENINGS = {
    "child": [
        "[Once upon a time|One day|Long ago], there was {a_small} {kind} named {hero}. {He} lived [near|close to|not far from] the {place}. {He} [loved|liked] to play with {his} {toy}.",
        "Once upon a time there was {a_good} {kind} called {hero}. {hero} lived with {his} [mother|father|family] in a [small|little|white|quiet] house.",
        "{hero} was {a_good} {kind}. [Every day|Every morning|After school], {he} went to the {place} [to play|to look around|with {his} {toy}].",
        "There once was {a_small} {kind} named {hero}, who was very {good}. {hero} had {a_color} {toy} and loved it [very much|a lot|more than anything].",
        "In a [small|quiet|little] [town|village] lived {a_kind} named {hero}. {He} was {good} and [liked to help|had many friends|asked many questions].",
        "Once upon a time, in a [small|little] house near the {place}, there lived {a_good} {kind}. {His} name was {hero}.",
    ],
    "animal": [
        "[Once upon a time|One day|Long ago], there was {a_small} {kind} named {hero}. {He} lived {in_place}.",
        "Once upon a time there was {a_good} {kind} called {hero}. {hero} lived {in_place} and [had many friends|knew every tree and every stone|liked to sing in the morning].",
        "{hero} was {a_good} {kind} who lived {in_place}. [Every day|Every morning], {he} looked for {animal_food} to eat.",
        "There once was {a_small} {kind} named {hero}. {He} could {can} better than [anyone|all the others], and {he} was very {good}.",
        "{in_place_cap} lived {a_good} {kind} named {hero}. {He} liked {animal_food} and [warm|sunny|quiet] days.",
        "Once upon a time, {a_kind} named {hero} lived {in_place} with {his} [mother|family|two brothers].",
    ],
}

PLOTS = {
    "lost_toy": "[One day|One morning], {hero} could not find {his} {toy}. {He} looked [under the bed|behind the door|in every corner], but it was not there. {hero} felt sad.\n\n{friend} the {fkind} came by. \"Why are you sad?\" asked {friend}. \"I lost my {toy},\" said {hero}. \"I will help you,\" said {friend}. They looked [for a long time|all morning|everywhere] {in_place}. Then {friend} saw something {color} [behind a tree|in the grass|under a stone]. It was the {toy}!\n\n\"Thank you, {friend}!\" said {hero}. {He} was so happy that {he} [laughed|danced|jumped up and down]. From that day on, {hero} always [put the {toy} away|took good care of the {toy}].",
    "share_food": "[One day|One afternoon], {hero} had {a_food}. It was the [last|best|biggest] one. {He} sat down {in_place} to eat it. Then {friend} the {fkind} came and said, \"I am so hungry. I have had nothing to eat today.\"\n\n{hero} looked at the {food}. {He} wanted to eat all of it, but {he} did not want {friend} to be hungry. So {he} [broke|cut] the {food} in two and gave {friend} half.\n\n\"Thank you,\" said {friend}. \"You are {good}.\" They ate together and the {food} tasted [better|even better|sweeter] than before. {hero} learned that [it is good to share|sharing makes friends|food is best with a friend].",
    "storm": "One day a big storm came. The wind blew and the rain fell. {hero} was [outside|far from home] {in_place} and got very wet. {He} was afraid of the loud thunder.\n\nThen {he} saw a small light. It was the house of {friend} the {fkind}. {hero} knocked on the door. \"Come in, come in!\" said {friend}. \"You can wait here until the storm is over.\"\n\nThey sat by the fire and [drank warm milk|told stories|ate {food} with honey]. Soon the rain stopped, and a rainbow was in the sky. \"Thank you for your help,\" said {hero}. And {he} went home, warm and dry.",
    "new_friend": "One day, {hero} went for a walk {in_place}. There {he} saw {a_fkind} sitting all alone. \"Hello, I am {hero},\" {he} said. \"What is your name?\"\n\n\"I am {friend},\" said the {fkind} in a quiet voice. \"I am new here and I have no friends.\"\n\n\"Then I will be your friend,\" said {hero}. {He} showed {friend} {his} {toy}, and they played [until the sun went down|all day long|until it was time for supper]. After that, {hero} and {friend} met every day. [They were best friends.|Neither of them was ever lonely again.]",
    "found_thing": "One day, {hero} found {a_color} {toy} {in_place}. \"How pretty!\" {he} said. \"But whose is it?\" {hero} wanted to keep it, but {he} knew that someone must be missing it.\n\nSo {he} asked everyone. {friend} the {fkind} said, \"That is my {toy}! I lost it [yesterday|last week|this morning]. I was so sad.\" {hero} gave it back at once.\n\n\"You are very honest,\" said {friend}. \"Here is {a_food} for you.\" {hero} smiled. It felt good to do the right thing.",
    "learn_swim": "{hero} wanted to learn to [swim|dive|float], but {he} was afraid of the water. All the others were in the [lake|pond|river], and {hero} sat alone [on the grass|on a stone|under a tree].\n\n{friend} the {fkind} came out of the water. \"I was afraid too,\" said {friend}. \"Let us start where it is not deep.\" {hero} put one foot in the water. It was cold! Then {he} put in the other one.\n\nEvery day {hero} tried again, and every day {he} went a little deeper. After a week {hero} could do it. \"Look at me!\" {he} called. {friend} [clapped|cheered|was very proud]. {hero} had learned that [brave means to try|you can be afraid and try all the same|every big thing starts small].",
    "garden": "In spring, {hero} put a small seed into the ground. Every day {he} gave it water. But nothing happened. \"Maybe it will never grow,\" said {hero}.\n\n\"Wait a little,\" said {friend} the {fkind}. \"Good things need time.\" So {hero} waited. The sun shone and the rain fell. And one morning there was a tiny green leaf!\n\nThe plant grew and grew. In summer it had a big {color} flower. All the [neighbors|animals|children] came to look at it. \"You were right,\" {hero} said to {friend}. \"Good things need time.\"",
    "dark": "{hero} was afraid of the dark. At night {he} saw [strange shapes|big shadows] on the wall and could not sleep.\n\nOne night {his} friend {friend} the {fkind} stayed with {him}. \"Let us look together,\" said {friend}. They took a lamp and looked. The big shadow was only {his} {toy}. The strange sound was only the wind.\n\n{hero} laughed. \"There is nothing to fear,\" {he} said. {friend} put out the lamp, and soon they were both asleep. After that, the dark was not so bad.",
    "race": "One day there was a race {in_place}. {hero} wanted to win. {friend} the {fkind} wanted to win, too. \"Ready, steady, go!\" called [the old owl|the teacher|everyone].\n\n{hero} ran as fast as {he} could. Halfway there, {friend} fell and hurt a foot. {hero} could hear {friend} cry. {He} stopped and went back. \"Come, I will help you,\" {he} said.\n\nThey walked over the line together, last of all. But everyone cheered for them. \"{hero} did not win the race,\" they said, \"but {he} is the best friend of all.\"",
    "birthday": "It was {hero}'s birthday. {He} woke up early and ran [to the kitchen|outside], but nobody said anything. \"Did they forget?\" thought {hero}. {He} walked sadly to the {place}.\n\nThere {he} met {friend} the {fkind}. \"Come with me,\" said {friend}. \"I want to show you something.\" They went back home. When {hero} opened the door, everyone jumped up and called, \"Happy birthday!\"\n\nThere was a big {food} cake, and {friend} gave {him} {a_color} {toy}. It was the best birthday {hero} ever had.",
    "broken": "{hero} was playing with {his} {toy} in the house. {His} mother had said not to do that. Crash! {He} broke [a blue cup|the big bowl|the window|a white plate].\n\n{hero} was afraid. {He} could say that [the wind|the cat|the dog] did it. But {he} did not want to lie. {He} went to {his} mother and said, \"I broke it. I am sorry.\"\n\nHis mother was sad, but she said, \"Thank you for telling me the truth. That was brave.\" Together they [cleaned the floor|picked up the pieces]. {hero} felt much better. From then on {he} played outside.",
    "rescue": "One day, {hero} heard a small voice {in_place}. \"Help! Help!\" {He} looked around and saw {friend} the {fkind}, who was stuck [in a deep hole|under a branch|between two big stones].\n\n\"Do not be afraid,\" said {hero}. \"I will get you out.\" {He} pulled and pulled, but {he} was not strong enough. Then {he} had an idea. {He} ran home and got [a long rope|a strong stick]. With it, {he} pulled {friend} out.\n\n\"You saved me!\" said {friend}. \"How can I thank you?\" \"You do not have to,\" said {hero}. \"Friends help each other.\"",
    "treasure": "{hero} found an old map {in_place}. There was a big X on it. \"A treasure!\" said {hero}. {He} showed it to {friend} the {fkind}, and they set out together.\n\nThey went over a bridge, around the lake, and past three tall trees. At the X they began to dig. They dug and dug until they hit [something hard|a wooden box]. Inside was {a_color} {toy} and a letter. It said, \"The real treasure is the friend who came with you.\"\n\n{hero} and {friend} looked at each other and laughed. It was true.",
    "sick_friend": "One day {friend} the {fkind} did not come to play. {hero} went to see what was wrong. {friend} was in bed. \"I am sick,\" said {friend}. \"I can not come out today.\"\n\n{hero} went home and made [warm soup|hot tea]. {He} also brought {a_food} and {his} own {toy}. Then {he} sat by the bed and told funny stories.\n\nThe next day {friend} felt better. \"Your soup was good,\" said {friend}, \"but your visit was the best medicine.\"",
    "cleanup": "The {place} was full of [trash|old paper and cans]. {hero} did not like it. \"Somebody should clean this up,\" said {friend} the {fkind}. \"We are somebody,\" said {hero}.\n\nSo they took [two big bags|a basket and a bag] and began. It was hard work. After a while [other children|their neighbors|the others] saw them and came to help. Soon the {place} was clean and beautiful.\n\n\"We did it together,\" said {hero}. That evening they all sat {in_place} and shared {a_food}.",
    "music": "{hero} had a [drum|flute|bell] and played it all day. But it was very loud, and nobody liked it. \"Please stop,\" said the others. {hero} was sad.\n\n{friend} the {fkind} said, \"You play with much joy. Now you must learn to play softly.\" Every day {friend} and {hero} practiced {in_place}. Slowly, the noise became a song.\n\nOne evening {hero} played for everyone. It was so beautiful that [even the birds were quiet|nobody said a word|some of them cried]. Then they all clapped. {hero} was very proud.",
    "snow": "It had snowed all night, and everything was white. {hero} ran out with {his} friend {friend} the {fkind}. They made a big [ball of snow|snowman] and gave it {a_color} hat.\n\nThen {hero} said, \"I wish the snow would stay forever.\" But the next day the sun came out, and the snow began to melt. {hero} was sad.\n\n\"Do not be sad,\" said {friend}. \"Winter will come again. And now we can look for the first flowers.\" {hero} took {friend} by the hand, and they went to look.",
    "wish": "One night {hero} saw a star fall. \"Make a wish,\" said {friend} the {fkind}. {hero} thought for a long time. {He} could wish for a new {toy}, or for a mountain of {foods}.\n\nThen {he} looked at {friend} and said, \"I have all I need. I wish that you are always happy.\" {friend} smiled. \"I wished the same for you,\" said {friend}.\n\nThey sat {in_place} and watched the sky until they fell asleep.",
    "too_small": "{hero} was the smallest of all. \"You are too small to help us,\" said the others. {hero} was sad and sat down {in_place}.\n\nOne day the key fell into a [tiny hole|narrow crack]. Nobody could get it out. {friend} the {fkind} tried, but {friend} was too big. \"Let me try,\" said {hero}. {He} was so small that {he} could reach inside, and {he} pulled out the key.\n\n\"Hooray for {hero}!\" everyone cried. From that day on nobody said that {hero} was too small.",
    "boaster": "{friend} the {fkind} liked to boast. \"I am the fastest and the strongest and the best,\" said {friend} every day. {hero} only smiled.\n\nOne day a heavy branch fell on the path {in_place}. {friend} pushed it and pulled it, but it did not move. \"Let us do it together,\" said {hero}. They pushed at the same time, and the branch rolled away.\n\n{friend} was quiet for a while. Then {friend} said, \"Together we are stronger than I am alone.\" \"That is the best thing you ever said,\" laughed {hero}.",
    "market": "{hero}'s mother gave {him} three coins. \"Please go to the market and buy {foods},\" she said. On the way {hero} saw {a_color} {toy}. It cost three coins, too. {He} wanted it so much!\n\n{hero} thought about {his} mother, who was waiting. {He} bought the {foods} and went home. \"Thank you, {hero},\" said {his} mother. \"I can count on you.\"\n\nThe next day {friend} the {fkind} came with a present. It was the {color} {toy}! \"I saw how you looked at it,\" said {friend}. {hero} was very happy.",
    "bread": "{hero} wanted to bake bread. \"Who will help me?\" {he} asked. \"Not I,\" said [the cat|the duck]. \"Not I,\" said [the goat|the pig]. But {friend} the {fkind} said, \"I will help you.\"\n\nThey mixed flour and water and salt. They waited until it was big and round. Then they put it in the oven, and soon the whole house smelled good.\n\nNow everyone came. \"May we have some?\" they asked. {hero} gave a piece to each of them. \"Next time we will help, too,\" they said. And they did.",
    "bridge": "There was an old bridge over the river. One day {hero} and {friend} the {fkind} met in the middle of it. The bridge was narrow. \"Let me pass,\" said {friend}. \"No, let me pass,\" said {hero}.\n\nThey stood there for a long time, and neither would move. Then {hero} began to laugh. \"How silly we are! If I lie down, you can step over me.\" So {he} did, and {friend} stepped over very carefully.\n\n\"Thank you,\" said {friend}. \"You are wiser than I am.\" And both of them went on their way.",
    "picture": "{hero} painted a picture of the {place}. {He} used [red and blue|green and yellow|all the colors {he} had]. But some water fell on it, and the colors ran. \"It is ruined!\" cried {hero}.\n\n{friend} the {fkind} looked at it for a while. \"I see a {color} bird here,\" said {friend}, \"and there is a boat.\" {hero} looked again. {friend} was right! {He} took the brush and painted an eye and a sail.\n\nIt became the best picture {he} ever made. {hero} hung it [on the wall|over the bed] and gave a copy to {friend}.",
    "lost_way": "{hero} went too far from home and lost the way. Everything {in_place} looked the same. It was getting dark. {hero} sat down and [began to cry|did not know what to do].\n\n\"Who is there?\" asked a voice. It was {friend} the {fkind}. \"I want to go home,\" said {hero}, \"but I do not know the way.\" \"Tell me what is near your house,\" said {friend}. \"A red barn and a tall tree,\" said {hero}.\n\n\"I know that place!\" said {friend}, and they walked there together. {hero}'s mother was waiting at the door. She hugged {him} and thanked {friend} again and again.",
    "kite": "It was a windy day. {hero} and {friend} the {fkind} made {a_color} kite. They took it to the {place}, and it flew up high. But then the string broke, and the kite was caught in a tree.\n\n\"I can climb up,\" said {hero}. \"That is too high,\" said {friend}. \"Let us wait for the wind.\" So they sat down and waited. After some time a strong wind came. It shook the tree, and the kite came down.\n\n\"It is good that we waited,\" said {hero}. They tied a new string, and the kite flew again.",
    "lazy": "All summer long, {friend} the {fkind} lay in the sun. {hero} worked hard and put away {foods} for the winter. \"Why do you work so much?\" asked {friend}. \"Come and play.\" \"Winter will come,\" said {hero}.\n\nThen winter came. It was cold, and {friend} had nothing to eat. {friend} knocked on {hero}'s door. \"May I come in?\"\n\n{hero} could have said no. But {he} opened the door and shared {his} food. \"Next summer I will work with you,\" said {friend}. And that is what happened.",
    "bird_wing": "{in_place_cap}, {hero} found a small bird. Its wing was hurt, and it could not fly. {hero} picked it up very gently and carried it home.\n\n{friend} the {fkind} helped {him} make a soft bed in a basket. They gave the bird water and seeds every day. Slowly the wing grew strong.\n\nOne morning the bird flew once around the room and out of the window. {hero} was sad and happy at the same time. But every spring the bird came back and sang [for {him}|in the tree by the window].",
    "quarrel": "{hero} and {friend} the {fkind} both wanted the {color} {toy}. \"It is mine!\" said {hero}. \"No, it is mine!\" said {friend}. They pulled and pulled until the {toy} broke in two.\n\nNow nobody had it. They looked at the pieces and felt ashamed. \"I am sorry,\" said {hero}. \"I am sorry, too,\" said {friend}. They got some glue and fixed it together.\n\nAfter that they took turns. First {hero} played with the {toy}, and then {friend}. It was more fun that way.",
    "moon": "{hero} wanted to touch the moon. {He} climbed on a chair, but the moon was too far. {He} climbed on [the roof|a hill|a tall tree], but it was still too far.\n\n{friend} the {fkind} watched {him}. \"Come down,\" said {friend}. \"I will show you the moon.\" They walked to the pond. There, in the dark water, was the big round moon. {hero} put one hand in the water and touched it.\n\n\"It is cold and wet,\" laughed {hero}. They sat by the pond for a long time. Then they went home to sleep.",
    "first_day": "It was {hero}'s first day at school. {He} did not know anyone, and {his} stomach felt funny. \"What if nobody likes me?\" {he} thought.\n\nAt the next table sat {friend} the {fkind}. {friend} had no pencil. {hero} had two. \"Here, take this one,\" said {hero}. {friend} smiled. \"Will you sit with me at lunch?\"\n\nAt the end of the day {his} mother asked, \"How was it?\" \"It was fine,\" said {hero}. \"I learned to write my name, and I have a friend.\"",
    "sleepy": "It was late, but {hero} did not want to go to bed. \"I am not tired,\" {he} said. {He} played with {his} {toy} and looked out of the window.\n\n{friend} the {fkind} was yawning. \"The sun is asleep,\" said {friend}. \"The flowers are asleep. Even the wind is asleep.\" \"But I am not tired,\" said {hero}, and yawned, too.\n\n\"Then just close your eyes and listen,\" said {friend}. {hero} closed {his} eyes. {He} could hear the clock, tick, tock, tick, tock. And before {he} could count to ten, {he} was fast asleep.",
    "bee_gift": "{hero} was angry at a bee that flew around {his} head. \"Go away!\" {he} shouted. \"Be kind to it,\" said {friend} the {fkind}. \"Bees help the flowers.\"\n\n{hero} sat down and watched. The bee went from flower to flower and did not hurt anyone. Next summer the trees {in_place} were full of {foods}.\n\n\"The bees did this,\" said {friend}. {hero} took {a_food} and bit into it. It was sweet. \"Thank you, bees,\" {he} said.",
    "slow": "{hero} was very slow. {friend} the {fkind} was very fast and laughed at {him}. \"You will never get there,\" said {friend}. They were both on the way to the {place}.\n\n{friend} ran ahead, then stopped to eat, then lay down for a nap. {hero} walked step by step and did not stop. When {friend} woke up, the sun was already low.\n\n{friend} ran as fast as possible. But {hero} was already there, and {he} had kept half of {his} {food} for {friend}. \"Slow and steady,\" said {hero} with a smile.",
    "cold_king": "Far away there was a king who never laughed. \"Whoever makes me laugh shall have a bag of gold,\" he said. Many came, but nobody could do it.\n\nThen {hero} came with {friend} the {fkind}. {hero} wanted to bow, but {he} fell over {his} own {toy} and landed in a big {food} cake. There was cream on {his} nose and on {his} ears. {friend} laughed, and {hero} laughed.\n\nAnd then the king laughed, too. He laughed until the tears ran down his face. He gave {hero} the gold, and {hero} shared it with everyone {in_place}.",
    "thank_you": "{hero} never said thank you. When {friend} the {fkind} gave {him} {a_food}, {he} just ate it. When {his} mother gave {him} a new {toy}, {he} just took it.\n\nOne day {hero} made a present for {friend}. {He} worked on it all day. {friend} took it and said nothing at all. {hero} felt a small pain inside. \"Is this how the others feel?\" {he} thought.\n\n{hero} ran home. \"Thank you, Mother,\" {he} said. \"Thank you for everything.\" {His} mother was surprised and gave {him} a big hug.",
    "echo": "{hero} stood on the mountain and called, \"Hello!\" A voice called back, \"Hello!\" \"Who are you?\" shouted {hero}. \"Who are you?\" shouted the voice. {hero} became angry. \"You are silly!\" {he} cried. \"You are silly!\" cried the voice.\n\n{hero} ran to {friend} the {fkind} and told the whole story. {friend} laughed. \"Go back and say something kind,\" said {friend}.\n\nSo {hero} went back and called, \"I like you!\" And the mountain answered, \"I like you!\" {hero} smiled all the way home. What you give is what you get.",
    "boat_trip": "{hero} and {friend} the {fkind} built a small boat. They painted it {color} and took {foods} and water with them. The wind was good, and they sailed to the island.\n\nBut in the night somebody forgot to tie up the boat. In the morning it was gone! \"Now what?\" said {friend}. {hero} thought hard. \"We will make a big fire, so that someone sees the smoke.\"\n\nIn the evening an old sailor came and took them home. \"Next time,\" said {friend}, \"I will tie the boat.\" \"And I will look twice,\" said {hero}.",
    "big_fish": "One day {hero} went fishing {in_place}. {He} waited and waited. At last {he} caught a tiny silver fish. \"Please let me go,\" said the fish. \"I am so small. One day I will help you.\"\n\n{hero} was hungry, but {he} felt sorry for the fish and put it back into the water. {friend} the {fkind} laughed and said, \"A fish can not help you.\"\n\nThe next week {hero} dropped {his} {toy} into the deep water. \"It is gone,\" {he} said. Then the little fish came up with the {toy} in its mouth. {friend} did not laugh any more.",
    "swing": "There was only one swing {in_place}, and {hero} was on it all day. {friend} the {fkind} waited and waited. \"May I have a turn?\" asked {friend}. \"Not yet,\" said {hero}.\n\nAt last {friend} went away. Now {hero} could swing as long as {he} wanted. But it was not fun any more. There was nobody to laugh with, and nobody to push {him}.\n\n{hero} went to find {friend}. \"I am sorry,\" {he} said. \"It is your turn now, and I will push you.\" They took turns until it was dark.",
}
HELD_OUT_PLOTS = {"big_fish", "swing"}  # never trained on: they measure what was learned beyond the wording

ENDINGS = ["", "", "", " The end.", " And they all lived happily.", " It was a good day.", " {hero} went home with a smile."]
LINKS = ["", "", "", "But something was about to happen. ", "Then came a day that {hero} never forgot. "]


@dataclass
class Story:
    """A finished story and the slots it was filled with."""

    text: str
    slots: dict[str, str]
    plot: str


def choose(rng: random.Random, text: str) -> str:
    """Resolve every `[a|b]`, innermost first."""
    while "[" in text:
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text


def pronouns(female: bool) -> dict[str, str]:
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {"he": he, "him": him, "his": his, "He": he.capitalize(), "His": his.capitalize()}


def make_slots(rng: random.Random, **wanted: str) -> dict[str, str]:
    """A hero, a friend, and the things around them. `wanted` may fix kind, hero, toy, place, food or fkind."""
    kind = wanted.get("kind") or (rng.choice(["girl", "boy"]) if rng.random() < 0.45 else rng.choice(HEROES))
    female = kind == "girl" if kind in ("girl", "boy") else rng.random() < 0.5
    hero = wanted.get("hero")
    if hero in GIRLS or hero in BOYS:
        female = hero in GIRLS
        if kind in ("girl", "boy"):
            kind = "girl" if female else "boy"
    if hero is None:
        names = GIRLS if female else BOYS
        hero = rng.choice(names if kind in ("girl", "boy") or rng.random() < 0.4 else PET_NAMES)
    fkind = wanted.get("fkind") or rng.choice([animal for animal in HEROES if animal != kind])
    friend = rng.choice([name for name in PET_NAMES + GIRLS + BOYS if name != hero])
    place = wanted.get("place") or rng.choice(list(PLACES))
    toy, food = wanted.get("toy") or rng.choice(TOYS), wanted.get("food") or rng.choice(FOODS)
    color, good, small = rng.choice(COLORS), rng.choice(GOOD), rng.choice(SMALL)
    foods = food[:-1] + "ies" if food.endswith("y") else food + ("es" if food.endswith(("o", "h")) else "s")
    foods = {"pie": "pies", "cookie": "cookies", "strawberry": "strawberries"}.get(food, foods)
    animal = ANIMALS.get(kind, {})
    return {
        **pronouns(female), "hero": hero, "kind": kind, "a_kind": article(kind), "friend": friend, "fkind": fkind,
        "a_fkind": article(fkind), "place": place, "in_place": PLACES[place],
        "in_place_cap": PLACES[place][0].upper() + PLACES[place][1:], "toy": toy, "food": food, "foods": foods,
        "a_food": article(food), "color": color, "a_color": article(color), "good": good, "a_good": article(good),
        "a_small": article(small), "animal_food": animal.get("food", food), "can": animal.get("can", "run"),
    }  # fmt: skip


def tell(rng: random.Random, plot: str | None = None, held_out: bool = False, **wanted: str) -> Story:
    """One story. `plot` names it; else any plot, of the held-out ones only if `held_out`."""
    names = sorted(HELD_OUT_PLOTS) if held_out else [name for name in PLOTS if name not in HELD_OUT_PLOTS]
    plot = plot or rng.choice(names)
    slots = make_slots(rng, **wanted)
    opening = rng.choice(OPENINGS["child" if slots["kind"] in ("girl", "boy") else "animal"])
    body = PLOTS[plot].replace("His mother", "{His} mother").replace("{friend}'s hand", "the hand")
    text = opening + "\n\n" + rng.choice(LINKS) + body + rng.choice(ENDINGS)
    return Story(choose(rng, text).format_map(slots), slots, plot)
