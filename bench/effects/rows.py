"""A CSV that grows by a row as the row is measured."""

import csv


class Rows:
    """keys: the fields that say which row it is; fields: the others, in the file's order."""

    def __init__(self, path, keys, fields):
        self.path, self.keys, self.fields = path, tuple(keys), (*keys, *fields)

    def read(self):
        """The rows that are there: dicts of texts."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def has(self, **key):
        """Whether a row of this key, of every key field, is there."""
        if key.keys() != set(self.keys):
            raise KeyError(f"a row's key is {', '.join(self.keys)}; got {', '.join(key)}")
        wanted = {name: text(value) for name, value in key.items()}
        return any(all(row[name] == value for name, value in wanted.items()) for row in self.read())

    def add(self, row):
        """Append one row, whole."""
        missing = set(self.fields) ^ row.keys()
        if missing:
            raise KeyError(f"a row of {self.path.name} has {', '.join(self.fields)}; {', '.join(sorted(missing))} differ")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: text(value) for name, value in row.items()})
        print(*(f"{name} {text(value)}" for name, value in row.items()), sep="  ", flush=True)


def text(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)
