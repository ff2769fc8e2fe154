#!/bin/sh
# Raw data -> checked shards that training reads, with statistics and a page to look at.
#   sh toolkits/prepare_data.sh FORMAT INPUT OUT [IMAGE_ROOT] [further arguments of `megatron-vlm data build`]
#   sh toolkits/prepare_data.sh xcomposer data.txt work/data images
#   MODEL=models/InternVL3-8B sh toolkits/prepare_data.sh internvl meta.json work/data
# FORMAT is llava, xcomposer, internvl, openai, parquet or webdataset. INPUT may be several files, separated by commas. With MODEL
# set, OUT/preview.html shows samples as that model gets them. `megatron-vlm launch` does all of this by itself from raw files.
set -eu
[ $# -ge 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 1; }
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/examples/common.sh"
format=$1 input=$2 out=$3
expand out MODEL # the other paths go to megatron-vlm, which reads them in the same way
shift 3
case ${1:-} in
"" | --*) ;;
*) root=$1; shift ;;
esac
if [ -e "$out/manifest.json" ] && [ "${REBUILD:-0}" != 1 ]; then
    echo "prepare_data: $out holds shards already; REBUILD=1 makes them anew"
else
    old_ifs=$IFS
    IFS=,
    # shellcheck disable=SC2086 # the commas separate files
    set -- --input $input "$@"
    IFS=$old_ifs
    [ ! -e "$out/manifest.json" ] || rm -rf "$out"
    megatron-vlm data build --format "$format" --out "$out" ${root:+--image-root "$root"} "$@"
fi
megatron-vlm data check "$out"
if [ -n "${MODEL:-}" ]; then
    megatron-vlm data preview "$out" --model "$MODEL" --out "$out/preview.html"
fi
