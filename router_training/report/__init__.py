"""The evaluation as one HTML page: pictures and tables made from figures, nothing measured here."""
