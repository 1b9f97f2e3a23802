# A server that answers heartbeats, in unmodified Debian perl, on a heap whose blocks glibc tags:
#
#     GLIBC_TUNABLES=glibc.mem.tagging=3 perl heartbeat.pl          lives: prints "heartbeat: ok", exits with 0
#     GLIBC_TUNABLES=glibc.mem.tagging=3 perl heartbeat.pl --bleed  dies of a tag check fault (SIGSEGV, SEGV_MTESERR)
#
# A heartbeat is a payload and the length that the sender claims it has; the answer is that many bytes from where the
# payload lies in the heap, as in the OpenSSL of 2014. perl's unpack "P" reads memory at an address without asking what
# lies there. An honest length stays inside the payload's block. A longer one leaves it: without tags the program then
# hands out what its neighbours hold, with tags the first byte of another block ends it.
use strict;
use warnings;

$| = 1;

sub answer {
    my ($payload, $claimed_length) = @_;
    # The address of the payload's bytes, its tag in the top byte, and then the bytes there.
    my $address = pack "P", $payload;
    return unpack "P$claimed_length", $address;
}

# Work that makes the heap busy: thousands of blocks come, grow, move and go.
my %answered;
for my $round (1 .. 5) {
    for my $n (1 .. 2000) {
        my $payload = join ",", map { $_ * $n } 1 .. 1 + $n % 40;
        my $answer = answer($payload, length $payload);
        die "heartbeat: round $round, request $n: wrong answer\n" if $answer ne $payload;
        $answered{$n % 500} .= substr $answer, 0, 8;
        delete $answered{$n % 499};
    }
}
my @sorted = sort { $answered{$a} cmp $answered{$b} } keys %answered;
print "heartbeat: answered 10000 requests, kept ", scalar @sorted, "\n";

if (@ARGV && $ARGV[0] eq "--bleed") {
    my $payload = "ping" x 4;
    my $secret = "secret" x 1000;
    print "heartbeat: a request claims 64 KiB and has ", length $payload, " bytes\n";
    my $answer = answer($payload, 65536);
    print "heartbeat: bled ", length $answer, " bytes of the heap", ($answer =~ /secretsecret/ ? ", a secret among them" : ""), "\n";
    exit 1;
}
print "heartbeat: ok\n";
