#!/usr/bin/env bash
# Put prometheus, promtool, prometheus-alertmanager and amtool into FOLDER/usr/bin, from Debian's packages: 30 MB, no
# root needed, nothing installed, nothing started.
#
#     capstone/alerts/get_tools.sh runs/tools
#
# Does nothing when they are there. Elsewhere than on Debian and Ubuntu: https://prometheus.io/download/, on the PATH.
set -euo pipefail
folder=${1:-runs/tools}
packages="prometheus prometheus-alertmanager"
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9 # two calls at a time: the second finds what the first has fetched
[ -x "$folder/usr/bin/prometheus" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
    echo "error: no apt-get here: put prometheus, promtool and amtool on the PATH (https://prometheus.io/download/)" >&2
    exit 1
}
partial=$(mktemp -d "$folder/partial.XXXXXX")
trap 'rm -rf "$partial"' EXIT
folder=$(realpath "$folder") partial=$(realpath "$partial")
cd "$partial"
# The system's package lists where there are any, else lists of our own: `apt-get update` for everybody needs root.
if ! apt-get --quiet=2 download $packages 2>/dev/null; then
    mkdir -p lists/partial cache/archives/partial
    own=(-o "Dir::State::Lists=$partial/lists" -o "Dir::Cache=$partial/cache" -o Debug::NoLocking=1)
    { apt-get --quiet=2 "${own[@]}" update && apt-get --quiet=2 "${own[@]}" download $packages; } >apt.log 2>&1 || {
        echo "error: Debian's package server was not reached, or has no $packages: $(tail -1 apt.log)" >&2
        exit 1
    }
fi
for file in *.deb; do dpkg-deb --extract "$file" unpacked; done
mv unpacked/usr "$folder/usr"
