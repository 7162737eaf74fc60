"""Rule-made stories: plots with slots and choices, filled from words.py.

In a plot `{name}` is a slot and `[a|b]` a choice. `tell` fills one plot for one hero; the slots it used are returned,
so that a chat can ask about the story just told.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from training.words import (
    ANIMALS,
    BOYS,
    COLORS,
    FOODS,
    GIRLS,
    GOOD,
    HEROES,
    PET_NAMES,
    PLACES,
    SMALL,
    TOYS,
    article,
    cap,
)

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
    "lost_toy": '[One day|One morning], {hero} could not find {his} {toy}. {He} looked [under the bed|behind the door|in every corner], but it was not there. {hero} felt sad.\n\n{friend} the {fkind} came by. "Why are you sad?" asked {friend}. "I lost my {toy}," said {hero}. "I will help you," said {friend}. They looked [for a long time|all morning|everywhere] {in_place}. Then {friend} saw something {color} [behind a tree|in the grass|under a stone]. It was the {toy}!\n\n"Thank you, {friend}!" said {hero}. {He} was so happy that {he} [laughed|danced|jumped up and down]. From that day on, {hero} always [put the {toy} away|took good care of the {toy}].',
    "share_food": '[One day|One afternoon], {hero} had {a_food}. It was the [last|best|biggest] one. {He} sat down {in_place} to eat it. Then {friend} the {fkind} came and said, "I am so hungry. I have had nothing to eat today."\n\n{hero} looked at the {food}. {He} wanted to eat all of it, but {he} did not want {friend} to be hungry. So {he} [broke|cut] the {food} in two and gave {friend} half.\n\n"Thank you," said {friend}. "You are {good}." They ate together and the {food} tasted [better|even better|sweeter] than before. {hero} learned that [it is good to share|sharing makes friends|food is best with a friend].',
    "storm": 'One day a big storm came. The wind blew and the rain fell. {hero} was [outside|far from home] {in_place} and got very wet. {He} was afraid of the loud thunder.\n\nThen {he} saw a small light. It was the house of {friend} the {fkind}. {hero} knocked on the door. "Come in, come in!" said {friend}. "You can wait here until the storm is over."\n\nThey sat by the fire and [drank warm milk|told stories|ate {food} with honey]. Soon the rain stopped, and a rainbow was in the sky. "Thank you for your help," said {hero}. And {he} went home, warm and dry.',
    "new_friend": 'One day, {hero} went for a walk {in_place}. There {he} saw {a_fkind} sitting all alone. "Hello, I am {hero}," {he} said. "What is your name?"\n\n"I am {friend}," said the {fkind} in a quiet voice. "I am new here and I have no friends."\n\n"Then I will be your friend," said {hero}. {He} showed {friend} {his} {toy}, and they played [until the sun went down|all day long|until it was time for supper]. After that, {hero} and {friend} met every day. [They were best friends.|Neither of them was ever lonely again.]',
    "found_thing": 'One day, {hero} found {a_color} {toy} {in_place}. "How pretty!" {he} said. "But whose is it?" {hero} wanted to keep it, but {he} knew that someone must be missing it.\n\nSo {he} asked everyone. {friend} the {fkind} said, "That is my {toy}! I lost it [yesterday|last week|this morning]. I was so sad." {hero} gave it back at once.\n\n"You are very honest," said {friend}. "Here is {a_food} for you." {hero} smiled. It felt good to do the right thing.',
    "learn_swim": '{hero} wanted to learn to [swim|dive|float], but {he} was afraid of the water. All the others were in the [lake|pond|river], and {hero} sat alone [on the grass|on a stone|under a tree].\n\n{friend} the {fkind} came out of the water. "I was afraid too," said {friend}. "Let us start where it is not deep." {hero} put one foot in the water. It was cold! Then {he} put in the other one.\n\nEvery day {hero} tried again, and every day {he} went a little deeper. After a week {hero} could do it. "Look at me!" {he} called. {friend} [clapped|cheered|was very proud]. {hero} had learned that [brave means to try|you can be afraid and try all the same|every big thing starts small].',
    "garden": 'In spring, {hero} put a small seed into the ground. Every day {he} gave it water. But nothing happened. "Maybe it will never grow," said {hero}.\n\n"Wait a little," said {friend} the {fkind}. "Good things need time." So {hero} waited. The sun shone and the rain fell. And one morning there was a tiny green leaf!\n\nThe plant grew and grew. In summer it had a big {color} flower. All the [neighbors|animals|children] came to look at it. "You were right," {hero} said to {friend}. "Good things need time."',
    "dark": '{hero} was afraid of the dark. At night {he} saw [strange shapes|big shadows] on the wall and could not sleep.\n\nOne night {his} friend {friend} the {fkind} stayed with {him}. "Let us look together," said {friend}. They took a lamp and looked. The big shadow was only {his} {toy}. The strange sound was only the wind.\n\n{hero} laughed. "There is nothing to fear," {he} said. {friend} put out the lamp, and soon they were both asleep. After that, the dark was not so bad.',
    "race": 'One day there was a race {in_place}. {hero} wanted to win. {friend} the {fkind} wanted to win, too. "Ready, steady, go!" called [the old owl|the teacher|everyone].\n\n{hero} ran as fast as {he} could. Halfway there, {friend} fell and hurt a foot. {hero} could hear {friend} cry. {He} stopped and went back. "Come, I will help you," {he} said.\n\nThey walked over the line together, last of all. But everyone cheered for them. "{hero} did not win the race," they said, "but {he} is the best friend of all."',
    "birthday": 'It was {hero}\'s birthday. {He} woke up early and ran [to the kitchen|outside], but nobody said anything. "Did they forget?" thought {hero}. {He} walked sadly to the {place}.\n\nThere {he} met {friend} the {fkind}. "Come with me," said {friend}. "I want to show you something." They went back home. When {hero} opened the door, everyone jumped up and called, "Happy birthday!"\n\nThere was a big {food} cake, and {friend} gave {him} {a_color} {toy}. It was the best birthday {hero} ever had.',
    "broken": '{hero} was playing with {his} {toy} in the house. {His} mother had said not to do that. Crash! {He} broke [a blue cup|the big bowl|the window|a white plate].\n\n{hero} was afraid. {He} could say that [the wind|the cat|the dog] did it. But {he} did not want to lie. {He} went to {his} mother and said, "I broke it. I am sorry."\n\nHis mother was sad, but she said, "Thank you for telling me the truth. That was brave." Together they [cleaned the floor|picked up the pieces]. {hero} felt much better. From then on {he} played outside.',
    "rescue": 'One day, {hero} heard a small voice {in_place}. "Help! Help!" {He} looked around and saw {friend} the {fkind}, who was stuck [in a deep hole|under a branch|between two big stones].\n\n"Do not be afraid," said {hero}. "I will get you out." {He} pulled and pulled, but {he} was not strong enough. Then {he} had an idea. {He} ran home and got [a long rope|a strong stick]. With it, {he} pulled {friend} out.\n\n"You saved me!" said {friend}. "How can I thank you?" "You do not have to," said {hero}. "Friends help each other."',
    "treasure": '{hero} found an old map {in_place}. There was a big X on it. "A treasure!" said {hero}. {He} showed it to {friend} the {fkind}, and they set out together.\n\nThey went over a bridge, around the lake, and past three tall trees. At the X they began to dig. They dug and dug until they hit [something hard|a wooden box]. Inside was {a_color} {toy} and a letter. It said, "The real treasure is the friend who came with you."\n\n{hero} and {friend} looked at each other and laughed. It was true.',
    "sick_friend": 'One day {friend} the {fkind} did not come to play. {hero} went to see what was wrong. {friend} was in bed. "I am sick," said {friend}. "I can not come out today."\n\n{hero} went home and made [warm soup|hot tea]. {He} also brought {a_food} and {his} own {toy}. Then {he} sat by the bed and told funny stories.\n\nThe next day {friend} felt better. "Your soup was good," said {friend}, "but your visit was the best medicine."',
    "cleanup": 'The {place} was full of [trash|old paper and cans]. {hero} did not like it. "Somebody should clean this up," said {friend} the {fkind}. "We are somebody," said {hero}.\n\nSo they took [two big bags|a basket and a bag] and began. It was hard work. After a while [other children|their neighbors|the others] saw them and came to help. Soon the {place} was clean and beautiful.\n\n"We did it together," said {hero}. That evening they all sat {in_place} and shared {a_food}.',
    "music": '{hero} had a [drum|flute|bell] and played it all day. But it was very loud, and nobody liked it. "Please stop," said the others. {hero} was sad.\n\n{friend} the {fkind} said, "You play with much joy. Now you must learn to play softly." Every day {friend} and {hero} practiced {in_place}. Slowly, the noise became a song.\n\nOne evening {hero} played for everyone. It was so beautiful that [even the birds were quiet|nobody said a word|some of them cried]. Then they all clapped. {hero} was very proud.',
    "snow": 'It had snowed all night, and everything was white. {hero} ran out with {his} friend {friend} the {fkind}. They made a big [ball of snow|snowman] and gave it {a_color} hat.\n\nThen {hero} said, "I wish the snow would stay forever." But the next day the sun came out, and the snow began to melt. {hero} was sad.\n\n"Do not be sad," said {friend}. "Winter will come again. And now we can look for the first flowers." {hero} took {friend} by the hand, and they went to look.',
    "wish": 'One night {hero} saw a star fall. "Make a wish," said {friend} the {fkind}. {hero} thought for a long time. {He} could wish for a new {toy}, or for a mountain of {foods}.\n\nThen {he} looked at {friend} and said, "I have all I need. I wish that you are always happy." {friend} smiled. "I wished the same for you," said {friend}.\n\nThey sat {in_place} and watched the sky until they fell asleep.',
    "too_small": '{hero} was the smallest of all. "You are too small to help us," said the others. {hero} was sad and sat down {in_place}.\n\nOne day the key fell into a [tiny hole|narrow crack]. Nobody could get it out. {friend} the {fkind} tried, but {friend} was too big. "Let me try," said {hero}. {He} was so small that {he} could reach inside, and {he} pulled out the key.\n\n"Hooray for {hero}!" everyone cried. From that day on nobody said that {hero} was too small.',
    "boaster": '{friend} the {fkind} liked to boast. "I am the fastest and the strongest and the best," said {friend} every day. {hero} only smiled.\n\nOne day a heavy branch fell on the path {in_place}. {friend} pushed it and pulled it, but it did not move. "Let us do it together," said {hero}. They pushed at the same time, and the branch rolled away.\n\n{friend} was quiet for a while. Then {friend} said, "Together we are stronger than I am alone." "That is the best thing you ever said," laughed {hero}.',
    "market": '{hero}\'s mother gave {him} three coins. "Please go to the market and buy {foods}," she said. On the way {hero} saw {a_color} {toy}. It cost three coins, too. {He} wanted it so much!\n\n{hero} thought about {his} mother, who was waiting. {He} bought the {foods} and went home. "Thank you, {hero}," said {his} mother. "I can count on you."\n\nThe next day {friend} the {fkind} came with a present. It was the {color} {toy}! "I saw how you looked at it," said {friend}. {hero} was very happy.',
    "bread": '{hero} wanted to bake bread. "Who will help me?" {he} asked. "Not I," said [the cat|the duck]. "Not I," said [the goat|the pig]. But {friend} the {fkind} said, "I will help you."\n\nThey mixed flour and water and salt. They waited until it was big and round. Then they put it in the oven, and soon the whole house smelled good.\n\nNow everyone came. "May we have some?" they asked. {hero} gave a piece to each of them. "Next time we will help, too," they said. And they did.',
    "bridge": 'There was an old bridge over the river. One day {hero} and {friend} the {fkind} met in the middle of it. The bridge was narrow. "Let me pass," said {friend}. "No, let me pass," said {hero}.\n\nThey stood there for a long time, and neither would move. Then {hero} began to laugh. "How silly we are! If I lie down, you can step over me." So {he} did, and {friend} stepped over very carefully.\n\n"Thank you," said {friend}. "You are wiser than I am." And both of them went on their way.',
    "picture": '{hero} painted a picture of the {place}. {He} used [red and blue|green and yellow|all the colors {he} had]. But some water fell on it, and the colors ran. "It is ruined!" cried {hero}.\n\n{friend} the {fkind} looked at it for a while. "I see a {color} bird here," said {friend}, "and there is a boat." {hero} looked again. {friend} was right! {He} took the brush and painted an eye and a sail.\n\nIt became the best picture {he} ever made. {hero} hung it [on the wall|over the bed] and gave a copy to {friend}.',
    "lost_way": '{hero} went too far from home and lost the way. Everything {in_place} looked the same. It was getting dark. {hero} sat down and [began to cry|did not know what to do].\n\n"Who is there?" asked a voice. It was {friend} the {fkind}. "I want to go home," said {hero}, "but I do not know the way." "Tell me what is near your house," said {friend}. "A red barn and a tall tree," said {hero}.\n\n"I know that place!" said {friend}, and they walked there together. {hero}\'s mother was waiting at the door. She hugged {him} and thanked {friend} again and again.',
    "kite": 'It was a windy day. {hero} and {friend} the {fkind} made {a_color} kite. They took it to the {place}, and it flew up high. But then the string broke, and the kite was caught in a tree.\n\n"I can climb up," said {hero}. "That is too high," said {friend}. "Let us wait for the wind." So they sat down and waited. After some time a strong wind came. It shook the tree, and the kite came down.\n\n"It is good that we waited," said {hero}. They tied a new string, and the kite flew again.',
    "lazy": 'All summer long, {friend} the {fkind} lay in the sun. {hero} worked hard and put away {foods} for the winter. "Why do you work so much?" asked {friend}. "Come and play." "Winter will come," said {hero}.\n\nThen winter came. It was cold, and {friend} had nothing to eat. {friend} knocked on {hero}\'s door. "May I come in?"\n\n{hero} could have said no. But {he} opened the door and shared {his} food. "Next summer I will work with you," said {friend}. And that is what happened.',
    "bird_wing": "{in_place_cap}, {hero} found a small bird. Its wing was hurt, and it could not fly. {hero} picked it up very gently and carried it home.\n\n{friend} the {fkind} helped {him} make a soft bed in a basket. They gave the bird water and seeds every day. Slowly the wing grew strong.\n\nOne morning the bird flew once around the room and out of the window. {hero} was sad and happy at the same time. But every spring the bird came back and sang [for {him}|in the tree by the window].",
    "quarrel": '{hero} and {friend} the {fkind} both wanted the {color} {toy}. "It is mine!" said {hero}. "No, it is mine!" said {friend}. They pulled and pulled until the {toy} broke in two.\n\nNow nobody had it. They looked at the pieces and felt ashamed. "I am sorry," said {hero}. "I am sorry, too," said {friend}. They got some glue and fixed it together.\n\nAfter that they took turns. First {hero} played with the {toy}, and then {friend}. It was more fun that way.',
    "moon": '{hero} wanted to touch the moon. {He} climbed on a chair, but the moon was too far. {He} climbed on [the roof|a hill|a tall tree], but it was still too far.\n\n{friend} the {fkind} watched {him}. "Come down," said {friend}. "I will show you the moon." They walked to the pond. There, in the dark water, was the big round moon. {hero} put one hand in the water and touched it.\n\n"It is cold and wet," laughed {hero}. They sat by the pond for a long time. Then they went home to sleep.',
    "first_day": 'It was {hero}\'s first day at school. {He} did not know anyone, and {his} stomach felt funny. "What if nobody likes me?" {he} thought.\n\nAt the next table sat {friend} the {fkind}. {friend} had no pencil. {hero} had two. "Here, take this one," said {hero}. {friend} smiled. "Will you sit with me at lunch?"\n\nAt the end of the day {his} mother asked, "How was it?" "It was fine," said {hero}. "I learned to write my name, and I have a friend."',
    "sleepy": 'It was late, but {hero} did not want to go to bed. "I am not tired," {he} said. {He} played with {his} {toy} and looked out of the window.\n\n{friend} the {fkind} was yawning. "The sun is asleep," said {friend}. "The flowers are asleep. Even the wind is asleep." "But I am not tired," said {hero}, and yawned, too.\n\n"Then just close your eyes and listen," said {friend}. {hero} closed {his} eyes. {He} could hear the clock, tick, tock, tick, tock. And before {he} could count to ten, {he} was fast asleep.',
    "bee_gift": '{hero} was angry at a bee that flew around {his} head. "Go away!" {he} shouted. "Be kind to it," said {friend} the {fkind}. "Bees help the flowers."\n\n{hero} sat down and watched. The bee went from flower to flower and did not hurt anyone. Next summer the trees {in_place} were full of {foods}.\n\n"The bees did this," said {friend}. {hero} took {a_food} and bit into it. It was sweet. "Thank you, bees," {he} said.',
    "slow": '{hero} was very slow. {friend} the {fkind} was very fast and laughed at {him}. "You will never get there," said {friend}. They were both on the way to the {place}.\n\n{friend} ran ahead, then stopped to eat, then lay down for a nap. {hero} walked step by step and did not stop. When {friend} woke up, the sun was already low.\n\n{friend} ran as fast as possible. But {hero} was already there, and {he} had kept half of {his} {food} for {friend}. "Slow and steady," said {hero} with a smile.',
    "cold_king": 'Far away there was a king who never laughed. "Whoever makes me laugh shall have a bag of gold," he said. Many came, but nobody could do it.\n\nThen {hero} came with {friend} the {fkind}. {hero} wanted to bow, but {he} fell over {his} own {toy} and landed in a big {food} cake. There was cream on {his} nose and on {his} ears. {friend} laughed, and {hero} laughed.\n\nAnd then the king laughed, too. He laughed until the tears ran down his face. He gave {hero} the gold, and {hero} shared it with everyone {in_place}.',
    "thank_you": '{hero} never said thank you. When {friend} the {fkind} gave {him} {a_food}, {he} just ate it. When {his} mother gave {him} a new {toy}, {he} just took it.\n\nOne day {hero} made a present for {friend}. {He} worked on it all day. {friend} took it and said nothing at all. {hero} felt a small pain inside. "Is this how the others feel?" {he} thought.\n\n{hero} ran home. "Thank you, Mother," {he} said. "Thank you for everything." {His} mother was surprised and gave {him} a big hug.',
    "echo": '{hero} stood on the mountain and called, "Hello!" A voice called back, "Hello!" "Who are you?" shouted {hero}. "Who are you?" shouted the voice. {hero} became angry. "You are silly!" {he} cried. "You are silly!" cried the voice.\n\n{hero} ran to {friend} the {fkind} and told the whole story. {friend} laughed. "Go back and say something kind," said {friend}.\n\nSo {hero} went back and called, "I like you!" And the mountain answered, "I like you!" {hero} smiled all the way home. What you give is what you get.',
    "boat_trip": '{hero} and {friend} the {fkind} built a small boat. They painted it {color} and took {foods} and water with them. The wind was good, and they sailed to the island.\n\nBut in the night somebody forgot to tie up the boat. In the morning it was gone! "Now what?" said {friend}. {hero} thought hard. "We will make a big fire, so that someone sees the smoke."\n\nIn the evening an old sailor came and took them home. "Next time," said {friend}, "I will tie the boat." "And I will look twice," said {hero}.',
    "balloon": '{hero} got {a_color} balloon at the fair. {He} held the string very tight. But a sudden gust [pulled it away|tore it from {his} hand], and the balloon rose over the roofs. {hero} began to cry.\n\n"Look," said {friend} the {fkind}, "it is going on a journey. Where do you think it will land?" {hero} wiped {his} eyes. "[On a ship|In a far country|On top of a mountain]," {he} said, and {he} smiled a little.\n\nThat night they drew a picture of all the places that the balloon might see. {hero} hung it over {his} bed.',
    "bakery": 'The baker was ill, and nobody in the village had bread. "We can bake it," said {hero} to {friend} the {fkind}. They put on white aprons and [rolled up their sleeves|washed their hands].\n\nThe first loaf was burned. The second was hard as stone. "One more," said {friend}. The third loaf was round and golden, and the whole street smelled of it.\n\nThey carried it to the baker\'s bed. He took a bite and laughed. "Tomorrow you may help me," he said, "but tonight you will sweep the flour off my ceiling!"',
    "library_cat": 'It rained, so {hero} went to the library. There {he} took a heavy old book from the lowest shelf. Behind it sat {friend} the {fkind}, fast asleep on a cushion.\n\n"Please do not tell anyone," whispered {friend}. "It is the only warm place I know." {hero} thought for a moment. Then {he} spoke to the librarian, who [was kind|wore big round glasses|never raised her voice].\n\nThe next day there was a sign on the door: "{friend} lives here. Please read softly." And every evening {hero} came and read a chapter aloud.',
    "letter": 'The mail carrier dropped a letter in the mud. {hero} found it, but the rain had washed the name away. "Whose can it be?" {he} asked.\n\n{He} went from house to house. The tailor shook his head. The teacher shook her head. At the last house lived {friend} the {fkind}, who never got any mail. {friend} opened it with shaking fingers. It was from a brother across the sea!\n\n"I have waited [three years|all winter|so long] for this," said {friend}. {hero} stayed for tea and heard every word of it.',
    "shadow": 'One sunny morning {hero} saw {his} shadow for the first time. {He} jumped, and the shadow jumped. {He} ran, and it ran. "Stop following me!" cried {hero}.\n\n{friend} the {fkind} laughed until {friend} had to sit down. "It belongs to you," said {friend}. "Lift your arms, and see what you can make." {hero} tried, and on the wall appeared [a bird|a rabbit with long ears|a ship with sails].\n\nThey played shadow theater until evening. When the sun went down, {hero} waved. "See you tomorrow," {he} said to {his} shadow.',
    "well": 'It had not rained for many weeks, and the well was dry. Everyone in the village was worried. {hero} took {his} {toy} and sat down {in_place} to think.\n\nThere {he} saw {friend} the {fkind} digging. "The grass is green here," said {friend}. "Where grass is green, there is water below." {hero} fetched a shovel. They dug until their backs ached, and at last cold clear water rushed out.\n\nThe neighbors came with buckets and jugs. From that day on the place was called the well of {hero} and {friend}.',
    "clock": 'The big clock in the tower stood still. Nobody knew when to eat and when to sleep. The mayor sent for a clever man, but he [was too wide for the stairs|only scratched his head].\n\n"I will look," said {hero}. {He} climbed up two hundred steps with {friend} the {fkind}. Between the wheels sat a tiny nest with three eggs. "We can not take it away," said {friend}. "Then the village must wait," said {hero}.\n\nThree weeks later the young birds flew out, and the clock struck twelve. Nobody was angry. They had all slept very well.',
    "lighthouse": 'A thick fog lay over the sea, and the lamp of the lighthouse was broken. {hero} heard a ship\'s horn far out. "They will hit the rocks!" {he} cried.\n\n{friend} the {fkind} had an idea. They carried wood to the top of the cliff and lit a fire. {hero} beat on a pot as loudly as {he} could. Boom, boom, boom!\n\nSlowly the ship turned away from the rocks. In the morning the captain came with [a chest of oranges|a parrot in a cage|a golden whistle]. "You are better than any lamp," he said.',
    "painting_fence": '{hero} had to paint the long fence, and {he} sighed with every stroke. Then {friend} the {fkind} came by. "What dull work," said {friend}.\n\n"Dull?" said {hero}. "It is an art. Not everyone can do it." {friend} looked at the brush. "May I try?" Soon {friend} was painting, and then two others wanted a turn as well.\n\nBy noon the fence was finished in {color}. {hero} felt a little guilty, so {he} bought {foods} for all of them. They ate and admired their work.',
    "dragon": 'People said that a dragon lived {in_place}. Nobody dared to go there. But {hero} was curious. {He} took {his} {toy} and went to see.\n\nThe dragon was green and as small as a dog, and it was crying. "I can not breathe fire," it said. "The others laughed at me." {hero} thought of {friend} the {fkind}, who made lanterns. "Can you make a little spark?" The dragon sneezed, and a candle began to burn.\n\nSince then the dragon lights the lanterns of the village every evening, and it is never lonely.',
    "lost_tooth": '{hero} had a loose tooth. {He} pushed it with {his} tongue all day and would not eat. "It will hurt when it comes out," {he} said.\n\n"Let us tie it to the door," said {friend} the {fkind}. "No!" cried {hero}. "Let us wait for it, then." They played [cards|with marbles|hide and seek], and {hero} laughed so much that {he} forgot about the tooth. Suddenly it lay in {his} hand.\n\n"It did not hurt at all," {he} said in surprise. That evening {he} put it in a tiny box and showed everyone the gap.',
    "night_train": '{hero} traveled on the night train to visit {his} grandmother. The wheels sang a song, and the dark fields flew past the window. In the same carriage sat {friend} the {fkind} with a heavy suitcase.\n\n"I am going to the sea," said {friend}. "I have never seen it." They shared {foods} and told each other about their homes. At dawn the train stopped, and there was the sea, silver and endless.\n\n{friend} stood quite still. "It is bigger than I thought," said {friend}. {hero} understood just what that meant.',
    "orchard": 'An old woman had an orchard full of fruit, but her knees were stiff. "Whoever picks for me may keep half," she said. {hero} and {friend} the {fkind} came with baskets.\n\n{friend} picked quickly and ate while picking. {hero} picked carefully and put every piece in the basket. In the evening {hero} had ten full baskets, and {friend} had one and a sore stomach.\n\n{hero} gave {friend} some mint tea. "Tomorrow," groaned {friend}, "I will eat less and pick more."',
    "magic_stone": '{hero} found a smooth stone with a white ring {in_place}. "It is a magic stone," said {friend} the {fkind}. "Whoever holds it is never afraid." {hero} put it in {his} pocket.\n\nWith the stone {he} dared to [cross the dark wood|speak before the whole class|jump from the high rock]. Then one day {he} reached into {his} pocket, and it was empty! The stone had fallen out a week ago.\n\n"But I was brave all week," said {hero} slowly. {friend} winked. "Then perhaps the magic was never in the stone."',
    "choir": 'The animals and the children wanted to sing together, but each wanted to sing alone and loudest. It sounded terrible. The windows shook, and a dog ran away howling.\n\n{hero} clapped {his} hands. "Let us first listen," {he} said. They were silent. They heard the wind, a brook, and far away a bell. Then {friend} the {fkind} began with one soft note, and {hero} joined in, and one after another they all found their place.\n\nAt the end nobody could tell who had been the loudest. It was simply a song.',
    "winter_coat": 'It was the coldest day of the year. {hero} had a new {color} coat with big buttons, and {he} was very proud of it. On the way to the {place} {he} met {friend} the {fkind}, who was shivering.\n\n{hero} walked past. After ten steps {he} stopped. {He} turned around. "There is room for two in here," {he} said and opened the coat.\n\nSo they walked home like one fat creature with four ears. People laughed, but {hero} and {friend} were warm.',
    "map_maker": '{hero} drew a map of everything {he} knew: the house, the path, and the crooked tree. At the edge of the paper {he} wrote, "Here I do not know." {friend} the {fkind} looked at it. "That is the best part," said {friend}.\n\nThey packed bread and a compass and walked to the edge of the map. They found [a waterfall|an old mill|a meadow full of poppies], and {hero} drew it in. They walked farther and drew more.\n\nThe map grew as large as a blanket. But at the edge it still said, "Here I do not know," and that made {hero} happy.',
    "wrong_bag": 'At the station {hero} took the wrong bag. At home {he} opened it and found a violin and {a_food}. "Oh no," said {hero}. "Somebody misses this."\n\nMeanwhile {friend} the {fkind} opened the other bag and found {a_toy} and two striped socks. They both ran back to the station and bumped into each other at the door. "Is this yours?" they both asked at once.\n\n{friend} played a tune to say thank you, and {hero} danced in {his} striped socks. Since then they have been friends.',
    "sheepdog": 'A little sheep had run away from the field, and evening came. {hero} took a lantern and went to look for it. {friend} the {fkind} came along, though {friend} was afraid of the wolf.\n\nThey called and listened. At last they heard a thin cry from [a thorn bush|the bottom of a ditch|behind the mill]. The little sheep was caught and could not move. {hero} cut the thorns, and {friend} carried it on the back.\n\nWhen they came home, ninety-nine sheep were waiting at the gate. "Now we are a hundred again," said {hero}.',
    "two_wishes": 'A fairy sat on {hero}\'s window. "You have two wishes," she said. {hero} was so excited that {he} called, "I wish I had {a_food}!" At once {a_food} lay on the table. "That was silly," said {friend} the {fkind}. "You should have asked for gold."\n\n{hero} got angry. "I wish it would stick to your nose!" And so it did. {friend} pulled and pulled, but it did not come off. "I have no wish left," said {hero}, and {he} was sorry.\n\nThe fairy laughed and gave {him} one more. {hero} used it for {friend}\'s nose. Then they shared the {food}, for that was all they had.',
    "big_fish": 'One day {hero} went fishing {in_place}. {He} waited and waited. At last {he} caught a tiny silver fish. "Please let me go," said the fish. "I am so small. One day I will help you."\n\n{hero} was hungry, but {he} felt sorry for the fish and put it back into the water. {friend} the {fkind} laughed and said, "A fish can not help you."\n\nThe next week {hero} dropped {his} {toy} into the deep water. "It is gone," {he} said. Then the little fish came up with the {toy} in its mouth. {friend} did not laugh any more.',
    "swing": 'There was only one swing {in_place}, and {hero} was on it all day. {friend} the {fkind} waited and waited. "May I have a turn?" asked {friend}. "Not yet," said {hero}.\n\nAt last {friend} went away. Now {hero} could swing as long as {he} wanted. But it was not fun any more. There was nobody to laugh with, and nobody to push {him}.\n\n{hero} went to find {friend}. "I am sorry," {he} said. "It is your turn now, and I will push you." They took turns until it was dark.',
}
HELD_OUT_PLOTS = {"big_fish", "swing"}  # never trained on: they measure what was learned beyond the wording

_MORALS = """
lost_toy|Take good care of your things, and let a friend help you.
share_food|Sharing makes the food taste better.
storm|It is good to open the door to someone in need.
new_friend|A kind word can begin a friendship.
found_thing|It is right to give back what you find.
learn_swim|You can be afraid and try all the same.
garden|Good things need time.
dark|What we fear is often small when we look at it.
race|A friend is worth more than winning.
birthday|Good friends do not forget you.
broken|It is brave to tell the truth.
rescue|Friends help each other.
treasure|A friend is the best treasure.
sick_friend|A visit can be the best medicine.
cleanup|Together we can do big things.
music|Practice makes noise into music.
snow|Things pass, and new good things come.
wish|Who has a friend has enough.
too_small|Small ones can do what big ones can not.
boaster|Together we are stronger than alone.
market|It is good when others can count on you.
bread|Who wants to eat should help to bake.
bridge|It is wise to give way.
picture|A mistake can become something beautiful.
lost_way|Stay calm and ask for help when you are lost.
kite|Sometimes it is best to wait.
lazy|Work in time, and share with those who did not.
bird_wing|Care for the weak, and let them go when they are strong.
quarrel|It is better to take turns than to fight.
moon|A friend can show you a new way to look.
first_day|Sharing a small thing can win a friend.
sleepy|Everyone needs sleep.
bee_gift|Even small creatures do useful work.
slow|Slow and steady comes to the goal.
cold_king|Laughing together is worth more than gold.
thank_you|We should say thank you.
echo|What you give is what you get.
boat_trip|Look twice before you rest.
balloon|Something lost can still make you dream.
bakery|Try again when something goes wrong.
library_cat|A kind person finds a place for everyone.
letter|It is worth the trouble to make someone glad.
shadow|What you fear may be a part of you.
well|Look closely, and work together.
clock|Some things are more important than the time.
lighthouse|A good idea can save many.
painting_fence|Work is fun when you see it as an art.
dragon|Everyone is good at something.
lost_tooth|Fear is often worse than the thing itself.
night_train|Strangers can become friends on the way.
orchard|Careful work brings more than greedy work.
magic_stone|The courage was in the hero and not in the stone.
choir|Listen to each other, and it becomes a song.
winter_coat|There is room for two when you are kind.
map_maker|There is always something new to find.
wrong_bag|A mistake can bring you a friend.
sheepdog|Nobody should be left behind.
two_wishes|Think before you wish.
big_fish|A small one can help a big one.
swing|It is more fun to share.
"""
MORALS = dict(line.split("|") for line in _MORALS.strip().split("\n"))

# Stories of three or four sentences.
SHORT_PLOTS = [
    "{A_kind} named {hero} found {a_toy} {in_place}. {friend} the {fkind} had lost it. {hero} gave it back, and they became friends.",
    "{hero} was {a_good} {kind}. One day {he} got lost {in_place}. {friend} the {fkind} showed {him} the way home.",
    "{A_kind} named {hero} was afraid of the rain. {friend} the {fkind} brought an umbrella. Then they jumped into every puddle together.",
    '{hero} the {kind} wanted to fly. {He} jumped from a stone and fell on {his} nose. "Walking is also nice," {he} said and went home.',
    "Once {a_kind} named {hero} had only one {food}. {friend} the {fkind} had none. They cut it in two, and both were happy.",
    "{hero} the {kind} planted a seed {in_place}. {He} waited a whole year. Then a {color} flower opened, and {hero} smiled.",
    'Every night {hero} the {kind} said good night to the moon. One night the clouds hid it. "Good night anyway," said {hero}, and a star answered with a wink.',
    '{hero} the {kind} lost {his} {toy} {in_place}. {friend} the {fkind} found it and brought it back. "You are a true friend," said {hero}.',
    'It snowed, and {hero} the {kind} built a snowman. The sun came and the snowman melted. "See you next winter," said {hero}.',
    "{A_kind} called {hero} and {a_fkind} called {friend} both wanted the {toy}. They pulled until it broke. Then they mended it together and took turns.",
    "{hero} the {kind} sang every morning. One day {he} was ill and silent. So {friend} the {fkind} sang for {him}, very badly, and {hero} laughed and got well.",
    "{hero} the {kind} counted the stars from {his} bed. {He} came to [nine|twelve|twenty], and then {he} was asleep.",
]

ENDINGS = [
    "",
    "",
    "",
    " The end.",
    " And they all lived happily.",
    " It was a good day.",
    " {hero} went home with a smile.",
]
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


def plural_food(food: str) -> str:
    return food[:-1] + "ies" if food.endswith("ry") else food + ("es" if food.endswith(("o", "h")) else "s")


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
    animal = ANIMALS.get(kind, {})
    return {
        **pronouns(female), "hero": hero, "kind": kind, "a_kind": article(kind), "A_kind": cap(article(kind)), "friend": friend, "fkind": fkind,
        "a_fkind": article(fkind), "place": place, "in_place": PLACES[place],
        "in_place_cap": cap(PLACES[place]), "toy": toy, "food": food, "foods": plural_food(food),
        "a_food": article(food), "a_toy": article(toy), "color": color, "a_color": article(color), "good": good, "a_good": article(good),
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


def tell_short(rng: random.Random, **wanted: str) -> Story:
    """A story of a few sentences."""
    slots = make_slots(rng, **wanted)
    return Story(choose(rng, rng.choice(SHORT_PLOTS)).format_map(slots), slots, "short")
