# What benchmarks share: figures, printed beside their goals, and waiting for guests.

# Set to 1 by the first goal that is missed.
missed=0

median() {
    tr ' ' '\n' <<< "$*" | sort -n | sed -n "$((($# + 1) / 2))p"
}

# ratio A B: A/B with three decimals.
ratio() {
    awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'
}

# paired LIST LIST: the median of what the numbers of one list are to those of the other, one by one, with three decimals.
paired() {
    local -a these those quotients=()
    local i
    read -ra these <<< "$1"
    read -ra those <<< "$2"
    for i in "${!these[@]}"; do
        quotients+=("$(ratio "${these[i]}" "${those[i]}")")
    done
    median "${quotients[@]}"
}

# goal TEXT VALUE LIMIT: a line with a figure that must not be above LIMIT.
goal() {
    local verdict=
    awk -v value="$2" -v limit="$3" 'BEGIN { exit !(value > limit) }' && verdict='   MISSED' missed=1
    printf '  %-52s %8s   goal: at most %s%s\n' "$1" "$2" "$3" "$verdict"
}

mib() {
    awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'
}

# ms MICROSECONDS…: as milliseconds.
ms() {
    awk -v all="$*" 'BEGIN { n = split(all, us, " "); for (i = 1; i <= n; i++) printf "%s%.1f", (i > 1 ? " " : ""), us[i] / 1000 }'
}

# field NAME: a number of the JSON that is read.
field() {
    sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p" | head -n 1
}

# until_console FILE TEXT: waits until the console in FILE has TEXT.
until_console() {
    local deadline=$((SECONDS + 300))
    until grep -qF -- "$2" "$1" 2> /dev/null; do
        [ $SECONDS -lt $deadline ] || { echo "no '$2' in $1:"; tail "$1"; exit 1; } >&2
        sleep 0.1
    done
}
