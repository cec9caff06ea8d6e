"""What the data layer needs of a run's config."""

from sat_lora.data.batches.sources import SourceSettings
from sat_lora.training.settings.config import TrainConfig


def source_settings(config: TrainConfig) -> SourceSettings:
    """Return the settings that decide which batches a run has."""
    data = config.data
    schedule = config.schedule
    saving = config.saving
    return SourceSettings(
        train_data=data.train_data or (),
        valid_data=data.valid_data,
        split=data.split,
        seed=schedule.seed,
        batch_size=schedule.batch_size,
        eval_batch_size=saving.eval_batch_size or schedule.batch_size,
        eval_iters=saving.eval_iters,
        num_workers=data.num_workers,
        max_pixels=data.max_pixels,
        ignore_keys=data.ignore_keys,
        images_from=data.images_from,
        names_are_answers=data.names_are_answers,
        run_folder=config.run_folder,
        data_format=data.data_format,
        columns=data.columns,
        image_mark=data.image_mark,
        images_per_sample=data.images_per_sample,
    )
