"""Human prose on which a tuned backbone is compared with the original. Written for this project; never trained on."""

from __future__ import annotations

PARAGRAPHS = (
    "The ferry leaves at seven, before the bakery opens, so everyone on board carries yesterday's bread. My aunt keeps hers in "
    "a tin that once held tea from Ceylon, and she opens it only when the island is out of sight, as if the crossing had to be "
    "paid for first.",
    "Nobody had told the new engineer that the pump was older than the building around it. She found out the hard way, on a "
    "Sunday, with a torch between her teeth and water up to her ankles, tracing a pipe that ended in a wall for no reason that "
    "anybody alive could remember.",
    "A good map leaves things out. The surveyor who draws every stone has drawn a second mountain, and it is no easier to "
    "climb. What the traveller wants is the three bends where people go wrong, the spring that does not dry up in August, and "
    "an honest word about the dog at the last farm.",
    "We measured the beam twice and got two answers. The first error was mine: I had read the scale from the side. The second "
    "took a week to find. The steel had lain in the sun all morning, and the tape had not, and between them they had grown "
    "apart by almost a millimetre.",
    "My grandfather repaired clocks, but he never wore a watch. He said that a man who spends his day making other things keep "
    "time should be allowed to lose his own. He was late for everything, including, the family likes to say, his own funeral, "
    "which snow delayed by two days.",
    "The committee met four times about the colour of the door. In the minutes of the third meeting, somebody asks whether the "
    "hinge has been looked at. Nobody answers. In spring the door, freshly painted in a green that pleased them all, came off "
    "in the mayor's hand.",
    "Soil is not dirt. Dirt is what you wash off; soil is what feeds you, and a handful of it holds more living things than "
    "there are people in the country. Most have no name. They eat what falls, and each other, and what they leave behind is "
    "what the wheat will drink in May.",
    "When the power failed, the whole street came out to look at it, as though darkness were something one could only see from "
    "outside. Somebody brought a guitar. By the time the lamps came on again, an hour later, two neighbours who had not spoken "
    "since the business with the hedge were arguing about the words of the second verse.",
    "To prune an apple tree, begin by walking around it. Cut what is dead, then what is ill, then what crosses and rubs. Stop "
    "there in the first year. The tree has taken a decade to reach its opinion about where the light comes from, and it "
    "deserves to be heard before it is corrected.",
    "The letter had been opened and closed again with great care, and that was the mistake. An honest postman tears an envelope "
    "now and then. Only somebody with something to hide uses steam, and only somebody with time to spare presses the flap under "
    "a book until it dries flat.",
    "Prices rose in the harbour towns first. It was not that there was less grain, but that everyone had heard there would be, "
    "and those with money bought twice what they needed. By the time the ships came in, full, there was bread enough for all "
    "and nobody left who could afford it.",
    "In the last lesson before the holidays, the teacher let us ask anything. We asked why the sky is blue, whether she was "
    "married, and how long a fish remembers. She answered the first with a prism, the second with a laugh, and for the third "
    "she took us down to the pond, where we stood in the rain until we had our own opinion.",
)
