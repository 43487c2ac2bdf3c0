"""What the names in `turboquant_core.__all__` are, imported when the first of them is asked for."""

from turboquant_core.codebook import Codebook as Codebook
from turboquant_core.codebook import grid_codebook as grid_codebook
from turboquant_core.config import PRESETS as PRESETS
from turboquant_core.config import TurboQuantConfig as TurboQuantConfig
from turboquant_core.key_transform import KeyTransform as KeyTransform
from turboquant_core.layout import KVCacheLayout as KVCacheLayout
from turboquant_core.mse import MSEQuantizer as MSEQuantizer
from turboquant_core.outlier import OutlierQuantizer as OutlierQuantizer
from turboquant_core.packing import pack as pack
from turboquant_core.packing import unpack as unpack
from turboquant_core.prod import ProdQuantizer as ProdQuantizer
from turboquant_core.quantized import QuantizedTensor as QuantizedTensor
from turboquant_core.rotation import Rotation as Rotation
from turboquant_core.vector_format import VectorFormat as VectorFormat
