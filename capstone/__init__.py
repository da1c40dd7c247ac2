"""The capstone: from raw text to a served model, as a package. Days 25 to 28 build it; each module names its days."""
