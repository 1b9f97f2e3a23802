# A ledger in unmodified Debian Python and SQLite, on heaps whose blocks glibc tags:
#
#     GLIBC_TUNABLES=glibc.mem.tagging=3 PYTHONMALLOC=malloc python3 ledger.py DATABASE ENOUGH
#
# Every transaction moves an amount between accounts and gives them names of new lengths, or is rolled back. The program
# has the same ledger in its own memory, each account an object of several blocks, and compares what it knows with what the
# database says, one account after every transaction and all of them at the end. Once the file ENOUGH exists it makes 20
# transactions more, compares, has SQLite check itself, and prints "ledger: ok". At the first difference it exits with 1.
import os
import random
import sqlite3
import sys

ACCOUNTS = 300
AMOUNT = 1000


class Account:
    def __init__(self, amount, name):
        self.amount = amount
        self.name = name
        self.history = [name[:16]]

    def change(self, amount, name):
        self.amount += amount
        self.name = name
        self.history = self.history[-20:] + [name[:16]]


def name():
    return random.randbytes(random.randrange(8, 700)).hex()


def compare(database, accounts, number):
    there = database.execute("SELECT amount, name FROM account WHERE id = ?", (number,)).fetchone()
    account = accounts[number]
    if there != (account.amount, account.name) or account.history[-1] != account.name[:16]:
        sys.exit(f"ledger: DIFFERENCE: account {number} is {there} in the database, {vars(account)} in memory")


def transact(database, accounts):
    source, target = random.sample(range(ACCOUNTS), 2)
    amount = random.randrange(1, 50)
    names = name(), name()
    database.execute("BEGIN IMMEDIATE")
    change = "UPDATE account SET amount = amount + ?, name = ? WHERE id = ?"
    database.execute(change, (-amount, names[0], source))
    database.execute(change, (amount, names[1], target))
    database.execute("INSERT INTO movement VALUES (NULL, ?, ?, ?)", (source, target, names[0] + names[1]))
    if random.random() < 0.2:
        database.execute("ROLLBACK")
    else:
        database.execute("COMMIT")
        accounts[source].change(-amount, names[0])
        accounts[target].change(amount, names[1])
    compare(database, accounts, source)


def main(path, enough):
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA cache_size = 40")
    database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, amount INTEGER, name TEXT)")
    database.execute("CREATE TABLE movement (id INTEGER PRIMARY KEY, source INTEGER, target INTEGER, note TEXT)")
    database.execute("CREATE INDEX by_note ON movement (note)")
    accounts = [Account(AMOUNT, name()) for _ in range(ACCOUNTS)]
    database.execute("BEGIN")
    for number, account in enumerate(accounts):
        database.execute("INSERT INTO account VALUES (?, ?, ?)", (number, account.amount, account.name))
    database.execute("COMMIT")
    made, left = 0, 20
    while left:
        transact(database, accounts)
        made += 1
        if made % 10 == 0:
            print(f"ledger: {made} transactions, 0 differences", flush=True)
        if os.path.exists(enough):
            left -= 1
    for number in range(ACCOUNTS):
        compare(database, accounts, number)
    (amount,) = database.execute("SELECT sum(amount) FROM account").fetchone()
    if amount != ACCOUNTS * AMOUNT:
        sys.exit(f"ledger: DIFFERENCE: all accounts together have {amount}")
    (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    print(f"ledger: integrity {verdict}")
    database.close()
    print("ledger: ok")


main(*sys.argv[1:])
