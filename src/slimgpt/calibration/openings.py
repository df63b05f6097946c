"""Short openings in many domains and languages that a model goes on from when it writes calibration text.

They say what kind of text follows and nothing of its content; all were written for this package.
"""

from __future__ import annotations

OPENINGS: dict[str, tuple[str, ...]] = {
    "news": (
        "The council voted on Tuesday to",
        "Shares of the company fell after",
        "Police said on Friday that",
        "The minister announced a new plan to",
        "Residents were told to leave their homes when",
        "After months of talks, the two sides",
    ),
    "encyclopaedia": (
        "The river rises in the hills of",
        "He was born in 18",
        "The battle was fought between",
        "The species is found in",
        "The album was released in",
        "The castle was built by",
        "She was an American",
        "The railway station is located in",
    ),
    "web": (
        "Our team has been working with customers since",
        "If you are looking for a new",
        "Last weekend we drove to",
        "I have been using this product for",
        "Welcome back to the blog! Today",
        "This hotel is close to",
        "Book your tickets now for",
        "The best way to clean",
        "Add to cart. This jacket",
        "Join us this Saturday for",
    ),
    "story": (
        "When the door finally opened,",
        "My grandmother never spoke about",
        '"You should not have come here,"',
        "It had been raining for three days and",
        "Once upon a time there was a",
        "The captain looked at the map and",
    ),
    "science": (
        "In this study we measured",
        "The results show that the temperature",
        "Cells divide when",
        "A common cause of the disease is",
        "Light from distant stars",
        "We propose a method for",
    ),
    "history": (
        "By the end of the war,",
        "In the sixteenth century, merchants",
        "The treaty was signed in",
        "The king and his advisers",
        "Early settlers in the valley",
    ),
    "speech": (
        "My fellow citizens, we have",
        "Ladies and gentlemen, it is",
        "Mr. Chairman, the question before us",
        "The government has spent on",
    ),
    "law": (
        "The parties agree that",
        "The court held that the defendant",
        "Any person who",
        "Under this policy, the customer",
    ),
    "teaching": (
        "In this lesson you will learn",
        "To solve the equation, first",
        "Photosynthesis is",
        "Step 1:",
        "Question: What is the difference between",
        "The main idea of the chapter is",
    ),
    "code": (
        "import os\n\ndef ",
        "def main():\n    ",
        "#include <stdio.h>\n\nint ",
        "public class ",
        "function ",
        "SELECT ",
        "# Installation\n\n",
        "The function returns an error when",
    ),
    "mathematics": (
        "Let $x$ be a real number such that",
        "The sum of the first n",
        "A train travels at 60",
        "Proof. Suppose that",
    ),
    "health": (
        "If you have pain in your",
        "Doctors recommend that patients",
        "A healthy breakfast",
        "Side effects of the medicine include",
    ),
    "kitchen": (
        "Preheat the oven to",
        "Ingredients:\n",
        "For the sauce, heat",
    ),
    "sport": (
        "The striker scored twice as",
        "In the second half, the visitors",
        "The race was won by",
    ),
    "opinion": (
        "I do not agree with the people who say",
        "This film is about",
        "What nobody tells you about",
        "Dear Sir or Madam,",
    ),
    "forum": (
        "Hi everyone, I have a problem with my",
        "Thanks for the reply! I tried",
        "Does anyone know how to",
    ),
    "business": (
        "The report describes the market for",
        "Customers pay for",
        "As a manager, you should",
    ),
}
"""Openings in English by domain."""

OTHER_LANGUAGES: dict[str, tuple[str, ...]] = {
    "de": ("Die Stadt liegt an", "In den letzten Jahren haben"),
    "fr": ("La ville est située", "Depuis plusieurs années, les"),
    "es": ("La ciudad se encuentra", "En los últimos años, los"),
    "pt": ("A cidade fica", "Nos últimos anos, os"),
    "it": ("La città si trova", "Negli ultimi anni, gli"),
    "nl": ("De stad ligt aan", "In de afgelopen jaren"),
    "pl": ("Miasto leży nad", "W ostatnich latach"),
    "ru": ("Город расположен на", "В последние годы"),  # noqa: RUF001
    "tr": ("Şehir,", "Son yıllarda"),  # noqa: RUF001
    "ar": ("تقع المدينة", "في السنوات الأخيرة"),
    "hi": ("यह शहर", "पिछले कुछ वर्षों में"),
    "zh": ("这座城市位于", "近年来,"),
    "ja": ("この町は", "近年、"),
    "ko": ("이 도시는", "최근 몇 년 동안"),
}
"""The same for other languages, by ISO 639-1 code."""

QUESTIONS = ("Write", "How", "What", "Explain", "Why", "Can you", "Give me", "Summarize", "Translate", "I")
"""Openings of a user's question; as many questions again begin with none."""
