//! Reads the programs' counters from the pinned map.

use std::path::Path;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use dataplane_common::counter::Counter as Index;

use super::{BpfError, Counter, settings::failed};

const COUNTERS: &str = "COUNTERS";

pub(super) fn read(pins: &Path) -> Result<Vec<Counter>, BpfError> {
    let pin = pins.join(COUNTERS);
    if !pin.exists() {
        return Ok(Vec::new());
    }
    let data = MapData::from_pin(&pin).map_err(failed("open", COUNTERS))?;
    let array: PerCpuArray<_, u64> =
        PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(failed("open", COUNTERS))?;
    Index::ALL
        .iter()
        .map(|index| {
            let values = match array.get(&(*index as u32), 0) {
                Ok(values) => values.iter().sum(),
                // An older agent's map of the same layout, with fewer counters.
                Err(MapError::OutOfBounds { .. }) => 0,
                Err(e) => return Err(failed("read", COUNTERS)(e)),
            };
            Ok(Counter { part: index.part(), name: index.name(), count: values })
        })
        .collect()
}
