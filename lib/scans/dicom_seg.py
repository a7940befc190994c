"""A mask as DICOM-SEG, which viewers of DICOM show over the series that it belongs to. See folder.dicom_seg."""

import hashlib

import nibabel as nib
import numpy as np

from lib.cohorts.dicom import load_series
from lib.runs.files import replacing

MAKER = "joint segmentation and registration"
ROOT = "2.25"  # of identifiers that are made from a number of 128 bits (DICOM part 5, B.2)


def write_dicom_seg(mask_file, series, values, names, file):
    """Write a mask beside the DICOM series that it was made of; the same mask and series give the same identifiers.

    Args:
        mask_file: NIfTI on the series' grid, as folder.write_scan writes it.
        series: folder of the DICOM series.
        values, names: label values of the classes, and what they are called.
        file: DICOM-SEG to be written; there is none where nothing is marked, as the format does not allow it.
    """
    import highdicom as hd  # takes seconds to import: only who asks waits
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    labels = np.asarray(nib.load(mask_file).dataobj).transpose(2, 1, 0)  # (slices, rows, columns) of the series
    shown = [(value, name) for value, name in zip(values, names) if (labels == value).any()]
    if not shown:
        file.unlink(missing_ok=True)
        return
    slices = [dcmread(part) for part in load_series(series).dataobj.files]
    of = hashlib.sha256(f"{slices[0].SeriesInstanceUID} {list(names)}".encode() + labels.tobytes()).hexdigest()
    unique = lambda what: f"{ROOT}.{int(hashlib.sha256((what + of).encode()).hexdigest()[:32], 16)}"
    algorithm = hd.AlgorithmIdentificationSequence(MAKER, codes.DCM.ArtificialIntelligence, "1")
    segments = [
        hd.seg.SegmentDescription(
            number,
            name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, (_, name) in enumerate(shown, start=1)
    ]
    masks = np.stack([labels == value for value, _ in shown], axis=-1).astype(np.uint8)
    segmentation = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=unique("series"),
        series_number=1000,
        sop_instance_uid=unique("instance"),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MAKER,
        software_versions="1",
        device_serial_number="1",
        series_description="segmentation",
    )
    with replacing(file) as partial:
        segmentation.save_as(partial)
