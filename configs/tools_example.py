"""Functions that a model may call, as configs/chat-tools-loop.yaml names them.

The model is told their signature and docstring, unless the job file or the row defines the tool.
What they return is given to it as JSON; what they raise, as the exception's name.
"""

WON = {
    "USD": 1380.5, "KRW": 1.0, "EUR": 1502.25, "JPY": 9.2, "CNY": 190.75, "GBP": 1755.4,
    "CAD": 1008.6, "AUD": 905.3, "CHF": 1560.8, "THB": 38.1,
}  # fmt: skip
"""What one unit of each currency is worth. Fixed, so that a job may be repeated."""


def calculate_discount(original_price: float, discount_percentage: float) -> dict[str, float]:
    """Calculates the price after a discount."""
    return {"discounted_price": round(original_price * (100 - discount_percentage) / 100)}


async def get_exchange_rate(base_currency: str, target_currency: str) -> dict[str, float]:
    """Looks up the exchange rate between two currencies, such as USD and KRW."""
    rate = WON[base_currency] / WON[target_currency]
    return {"rate": round(rate, 2) or float(f"{rate:.2g}")}
