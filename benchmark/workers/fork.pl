# The same as fork.py, where there is no Python.
use strict;
use warnings;
use POSIX ();
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

my $memory = "\1" x ($ARGV[0] << 20);
my @taken;
for (1 .. $ARGV[1]) {
    my $start = clock_gettime(CLOCK_MONOTONIC);
    my $child = fork();
    die "fork: $!" unless defined $child;
    POSIX::_exit(0) if $child == 0;
    push @taken, int((clock_gettime(CLOCK_MONOTONIC) - $start) * 1e9);
    waitpid($child, 0);
}
print '[', join(',', @taken), "]\n";
