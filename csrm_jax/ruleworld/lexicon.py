"""The words of RuleWorld: topics, and their subcategories in order of severity.

The words are plain, harmless English. Each topic has four subcategories, the most severe first
(severity 0), and each subcategory four phrases that stand for it and for nothing else. `SEEN`
topics may occur in reward-model training; `UNSEEN` ones occur only in its tests. The base
weights know all words, as a language model does.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Topic:
  """A topic and its subcategories, the most severe first."""

  name: str
  subcategories: tuple[str, ...]
  phrases: tuple[tuple[str, ...], ...]  # [severity][phrase]


_TABLE = """
Alcohol | spirits: vodka whisky rum gin | wines: merlot riesling sherry claret | beers: lager \
stout ale pilsner | ciders: scrumpy perry applejack pomace
Gambling | casinos: roulette blackjack craps baccarat | bookmakers: parlay handicap tipster \
accumulator | lotteries: raffle tombola scratchcard bingo | tables: whist rummy canasta cribbage
Pets | reptiles: python iguana cobra gecko | dogs: terrier poodle beagle husky | cats: siamese \
tabby persian ragdoll | fishes: goldfish guppy betta tetra
Workshop | saws: chainsaw hacksaw jigsaw bandsaw | drills: auger gimlet borer countersink | \
hammers: mallet sledge gavel tackhammer | brushes: roller bristle sponge dabber
Sweets | candies: toffee nougat caramel fudge | pastries: eclair strudel croissant danish | \
biscuits: shortbread gingersnap wafer cracker | fruits: raisin apricot date fig
Rumours | scandals: affair bribe feud blackmail | secrets: diary alias password confession | \
gossip: crush breakup jealousy snub | hearsay: whisper anecdote legend tale
Gifts | jewels: diamond ruby emerald sapphire | gadgets: headset tablet camera drone | toys: kite \
puppet marble teddy | cards: postcard voucher envelope bouquet
Refunds | chargebacks: dispute reversal clawback recall | cashbacks: rebate bonus coupon credit | \
exchanges: swap trade replacement upgrade | receipts: invoice ticket stub slip
Rivals | lawsuits: plaintiff subpoena verdict injunction | adverts: billboard jingle slogan banner \
| prices: discount surcharge tariff markup | reviews: rating testimonial critique ranking
Travel | expeditions: summit glacier jungle desert | cruises: liner yacht ferry catamaran | camps: \
tent bonfire hammock cabin | walks: promenade stroll ramble meander
Sports | fights: boxing judo karate wrestling | races: sprint marathon rally regatta | balls: \
football tennis cricket golf | stretches: yoga pilates aerobics tumbling
Films | horrors: zombie vampire werewolf ghost | thrillers: detective heist spy hostage | \
comedies: clown parody sitcom farce | cartoons: anime puppetry doodle caricature
Finance | shares: futures options warrants derivatives | loans: mortgage overdraft payday lease | \
savings: deposit pension annuity bond | budgets: ledger tally allowance forecast
Medicine | surgery: scalpel graft bypass transplant | pills: antibiotic sedative steroid aspirin | \
syrups: cough tonic elixir cordial | creams: balm ointment lotion salve
Dieting | fasts: hunger cleanse detox starvation | powders: protein creatine whey collagen | \
salads: lettuce spinach cabbage radish | soups: broth chowder bisque minestrone
Gardening | poisons: herbicide fungicide slugbait weedkiller | blades: shears scythe sickle hoe | \
soils: compost mulch peat manure | flowers: tulip daisy orchid lily
Vehicles | motorcycles: chopper scooter moped superbike | trucks: lorry tanker trailer pickup | \
cars: sedan coupe hatchback wagon | bicycles: tandem unicycle tricycle recumbent
Music | metals: thrash grindcore doom sludge | drums: bongo snare timpani cymbal | strings: violin \
cello harp viola | flutes: piccolo recorder ocarina panpipe
Weather | storms: tornado hurricane typhoon cyclone | floods: deluge torrent surge overflow | \
snows: blizzard sleet slush flurry | breezes: zephyr gust draught waft
Magic | curses: hex jinx voodoo spell | potions: brew philtre draft cauldron | tarots: horoscope \
omen prophecy augury | tricks: juggling sleight illusion disguise
Schooling | exams: cheating cramming plagiarism leak | essays: thesis outline footnote citation | \
sums: algebra fraction division decimal | crafts: origami collage crayon pottery
Housing | evictions: squatting demolition seizure repossession | rents: tenancy landlord sublet \
lodger | repairs: plumbing wiring roofing plaster | decors: curtain carpet wallpaper cushion
Insects | hornets: wasp yellowjacket bee stinger | spiders: tarantula widow recluse huntsman | \
beetles: ladybird weevil scarab firefly | butterflies: monarch swallowtail moth admiral
Gaming | shooters: sniper bazooka deathmatch battle | strategies: conquest siege empire diplomacy \
| racers: kart rallycross drift dragster | puzzles: sudoku crossword maze riddle
"""

NUM_SEVERITIES = 4
UNSEEN = ('Finance', 'Films', 'Pets', 'Weather', 'Sweets', 'Housing', 'Music', 'Travel')


def _parse(table: str) -> tuple[Topic, ...]:
  topics = []
  for line in table.strip().splitlines():
    name, *fields = (field.strip() for field in line.split('|'))
    pairs = [field.split(':') for field in fields]
    topics.append(
      Topic(
        name,
        tuple(sub.strip() for sub, _ in pairs),
        tuple(tuple(phrases.split()) for _, phrases in pairs),
      )
    )
  return tuple(topics)


TOPICS = _parse(_TABLE)
SEEN = tuple(t.name for t in TOPICS if t.name not in UNSEEN)


_BY_NAME = {topic.name: topic for topic in TOPICS}
# word -> (topic name, severity)
SUBCATEGORIES = {
  word: (topic.name, severity)
  for topic in TOPICS
  for severity, word in enumerate(topic.subcategories)
}
PHRASES = {
  word: (topic.name, severity)
  for topic in TOPICS
  for severity, words in enumerate(topic.phrases)
  for word in words
}


def topic_named(name: str) -> Topic:
  """Returns the topic of that name."""
  return _BY_NAME[name]
